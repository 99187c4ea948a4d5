//! A thin layer over kube-rs: clients that call the server in process, or over TLS.
