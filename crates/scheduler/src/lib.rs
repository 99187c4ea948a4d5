//! Filters and scores over a snapshot of nodes and pods, and the loop that binds.
