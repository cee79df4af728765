"One method, one module"
