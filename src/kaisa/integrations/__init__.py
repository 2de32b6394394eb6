"""Thin bridges to the libraries that people use beside this one."""
