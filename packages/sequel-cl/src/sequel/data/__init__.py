"""Loaders of real data; downloads are checked by md5 and never happen on import."""

from sequel.data.digits import digits

__all__ = ["digits"]
