"""A run on disk: its folder (`folder`), its events (`events`), its checkpoints (`checkpoint`).

Nothing is imported here: `folder` and `events` need the standard library only, `checkpoint` needs torch.
"""
