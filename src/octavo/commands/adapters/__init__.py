"""`octavo adapters`: shows an adapter, compares two, and combines several into one."""
