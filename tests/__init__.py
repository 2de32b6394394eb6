"""Makes this package found before others of the name: some of the libraries that tests compare with install one."""
