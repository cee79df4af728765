"Networks, one kind, one module"
