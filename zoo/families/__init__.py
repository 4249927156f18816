"""One base per family of methods: how it is applied, measured in which unit, undone."""
