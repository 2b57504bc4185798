"""From the user's files to batches, one plain function between two small frozen dataclasses at a time.

    paths -> documents.read -> Document -> tokens.encode -> Tokens
    Tokens -> packing.pack -> Row -> loader.batches -> Batch

Nothing is imported here: `documents` needs the standard library only, `loader` alone needs torch.
"""
