//! Policies kept fresh: from `files` on a host, or from the `cluster`. Both publish a whole
//! [`PolicySet`](super::PolicySet) whenever what they follow says something else, and never one with a mistake in it.

mod cluster;
mod files;

pub use self::{
    cluster::{ClusterPolicies, Examined, resource},
    files::{LoadError, MAX_FILES, MAX_SET_BYTES, PolicyFiles, read_set},
};
