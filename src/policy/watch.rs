//! temporary
use super::*;
use std::path::PathBuf;
/// t
pub struct PolicyFiles(tokio::sync::watch::Sender<Arc<PolicySet>>);
use std::sync::Arc;
impl PolicyFiles {
    /// t
    pub fn load(paths: Vec<PathBuf>, _m: crate::metrics::Metrics) -> Result<Self, String> {
        let sources: Vec<_> = paths
            .iter()
            .map(|p| Source { origin: p.display().to_string(), text: std::fs::read_to_string(p).unwrap() })
            .collect();
        Ok(Self(tokio::sync::watch::channel(Arc::new(PolicySet::parse(&sources).map_err(|p| format!("{p:?}"))?)).0))
    }
    /// t
    pub fn subscribe(&self) -> tokio::sync::watch::Receiver<Arc<PolicySet>> {
        self.0.subscribe()
    }
    /// t
    pub async fn run(self, stop: tokio_util::sync::CancellationToken) {
        stop.cancelled().await
    }
}
