//! The controllers: each is one file with a pure plan; applying a plan is shared.
