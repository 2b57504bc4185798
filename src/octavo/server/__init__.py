"""HTTP server for a base model and its LoRA adapters: OpenAI's API, the legacy /prompt/ route, and request limits.

Needs `pip install octavo[serve]`. Routes call the engine through the protocol `service.Engine`; no tensors here.
"""
