//! stub
/// A chain.
#[derive(Debug, Clone)]
pub struct Chain(());
/// Roots.
#[derive(Debug, Clone)]
pub struct Bundle(());
