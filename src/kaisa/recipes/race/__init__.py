"""The race: optimizers of many kinds on one course a recipe, by rules written down before (docs/race.md)."""
