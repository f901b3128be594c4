"""How the kernels are cut: configurations as data, tables that are shipped, a cache on disk, and the search."""
