//! What every backend must keep, as code.
