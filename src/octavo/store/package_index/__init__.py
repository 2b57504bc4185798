"""Fetches one pinned file from a Python package index, as pip would find it, without pip.

settings.py      indexes, proxy, certificates and time limits, from pip's environment variables and files
client.py        HTTP(S) with credentials that are sent only to their host
simple.py        the file's URL on an index of PEP 503 (HTML) or PEP 691 (JSON), or in a folder
download.py      the download: resumed after a broken connection, bounded in size, verified by SHA-256
"""
