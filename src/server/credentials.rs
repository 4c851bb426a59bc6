//! `csrd.v1.StatusService`: what the agent holds, without secrets, as far as the caller may see it.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use super::{Arrival, Engine, convert};
use crate::proto::v1;

/// The service.
pub(super) struct Credentials {
    engine: Arc<Engine>,
}

impl Credentials {
    pub(super) fn new(engine: Arc<Engine>) -> Self {
        Self { engine }
    }
}

#[tonic::async_trait]
impl v1::status_service_server::StatusService for Credentials {
    async fn list_credentials(
        &self,
        request: Request<v1::ListCredentialsRequest>,
    ) -> Result<Response<v1::ListCredentialsResponse>, Status> {
        let arrival = Arrival::of(&request);
        let caller = arrival.workload(&self.engine).await?;
        // A pod is nobody's operator, whatever user its image runs as, but the agent's own: who is in there is the agent.
        let operator = caller.unix().is_some_and(|unix| unix.uid == 0 || unix.uid == self.engine.operator_uid)
            || self.engine.attestor.is_own_pod(&caller);
        let rows = self.engine.hub.rows(|workload| operator || *workload == *caller);
        let credentials = rows.iter().map(convert::credential_status).collect();
        Ok(Response::new(v1::ListCredentialsResponse { credentials }))
    }
}
