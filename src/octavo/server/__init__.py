"""A model and its adapters behind HTTP: OpenAI's API, the article's /prompt/, and what keeps both within bounds.

Needs `pip install octavo[serve]`. The engine is asked through `service.Engine`; nothing here touches a tensor.
"""
