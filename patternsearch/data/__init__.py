"""What loaders share: finding and fetching files, the cache of arrays, formats of the field."""
