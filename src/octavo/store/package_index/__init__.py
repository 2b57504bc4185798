"""Fetches one pinned file from a Python package index, as pip would find it, without pip.

settings.py      which indexes, proxy, certificates and time limits pip's environment variables and files name
client.py        HTTP(S) with credentials that stay with their host
simple.py        the file's address on an index of PEP 503 (HTML) or PEP 691 (JSON), or in a folder
download.py      the file itself: resumed after a cut connection, bounded in size, checked by SHA-256
"""
