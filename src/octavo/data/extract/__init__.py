"""Text of documents that other programs wrote: office documents, e-books, PDF, reStructuredText.

Each reader yields one RawRecord a file: the text in reading order, where its pages or chapters begin, and counts of
what was removed (page numbers, running heads, marks of footnotes) and of what could not be read. Footnotes come last,
so that they interrupt no sentence.
"""
