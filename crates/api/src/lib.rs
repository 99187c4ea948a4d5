//! Every Kubernetes resource as a row: schema, defaults, validation, columns, patch keys. No I/O.
