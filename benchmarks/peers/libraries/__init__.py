"""Each row in each library's own words: what its users would write, by its documentation.

A module is imported in its library's own environment alone.
"""
