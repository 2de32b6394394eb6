"""The commands of `kaisa`, a file each; `kaisa.cli` puts them together."""
