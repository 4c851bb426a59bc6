//! grpc.health.v1: whether this process can issue, as `/readyz` says it, and why not.
//!
//! That it answers at all says that the process is alive: the answer comes from the thread that does everything else.
//! The agent has this service on its socket, beside the others. The controller, which serves nobody else, has it on a
//! socket that only its own user and root can connect to: no other pod reaches a socket in its folder, and no other user
//! of the host can take a place there. That is why connections to it have no bound.

use std::io;

use futures_util::stream;
use tokio::{
    net::{UnixListener, UnixStream},
    time::sleep,
};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, metadata::MetadataValue, transport::Server};
use tonic_health::{
    ServingStatus,
    pb::{HealthCheckRequest, HealthCheckResponse, health_server},
    server::{HealthReporter, HealthService, WatchStream},
};

use super::{ACCEPT_PAUSE, admin::Readiness};
use crate::proto::{WHY_NOT, v1::certificate_service_server::SERVICE_NAME};

/// Bytes of the reasons that go with an answer; the rest is cut.
pub const MAX_WHY_NOT_BYTES: usize = 1024;
/// Mode of the controller's socket.
pub const SOCKET_MODE: u32 = 0o600;

/// The service of grpc.health.v1; [`report`] keeps what it answers up to date.
pub type Service = health_server::HealthServer<Health>;

/// Answers what was reported, with the reasons where that is no.
#[derive(Debug)]
pub struct Health {
    reported: HealthService,
    readiness: Readiness,
}

/// The service, and what [`report`] reports by.
pub fn service(readiness: Readiness) -> (HealthReporter, Service) {
    let reporter = HealthReporter::new();
    let reported = HealthService::from_health_reporter(reporter.clone());
    (reporter, Service::new(Health { reported, readiness }))
}

/// Reports whether certificates can be issued, until `stop`.
pub async fn report(reporter: HealthReporter, readiness: Readiness, stop: CancellationToken) {
    loop {
        let ready = readiness.check().is_ok();
        let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
        reporter.set_service_status("", status).await;
        reporter.set_service_status(SERVICE_NAME, status).await;
        tokio::select! {
            () = stop.cancelled() => return,
            () = readiness.becomes(!ready) => {}
        }
    }
}

/// Serves grpc.health.v1 and nothing else at `listener`, until `stop`; an answer under way is cut off then.
pub async fn serve(listener: UnixListener, readiness: Readiness, stop: CancellationToken) {
    let (reporter, service) = service(readiness.clone());
    let incoming =
        stream::unfold(listener, |listener| async { Some((Ok::<_, io::Error>(accept(&listener).await), listener)) });
    tokio::select! {
        () = report(reporter, readiness, stop) => {}
        ended = Server::builder().add_service(service).serve_with_incoming(incoming) => {
            let error = ended.err().map(tracing::field::display);
            tracing::error!(error, "the health socket is not served any more");
        }
    }
}

async fn accept(listener: &UnixListener) -> UnixStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection on the health socket");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

#[tonic::async_trait]
impl health_server::Health for Health {
    async fn check(&self, request: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        let mut answer = self.reported.check(request).await?;
        if let Some(why) = self.readiness.why_not() {
            let why = &why.as_bytes()[..why.floor_char_boundary(MAX_WHY_NOT_BYTES)];
            answer.metadata_mut().insert_bin(WHY_NOT, MetadataValue::from_bytes(why));
        }
        Ok(answer)
    }

    type WatchStream = WatchStream;

    async fn watch(&self, request: Request<HealthCheckRequest>) -> Result<Response<WatchStream>, Status> {
        self.reported.watch(request).await
    }
}

#[cfg(test)]
mod tests {
    use tonic_health::pb::health_server::Health as _;

    use super::*;

    async fn check(readiness: Readiness) -> (i32, Option<String>) {
        let (reporter, _) = service(readiness.clone());
        let stop = CancellationToken::new();
        stop.cancel();
        report(reporter.clone(), readiness.clone(), stop).await;
        let health = Health { reported: HealthService::from_health_reporter(reporter), readiness };
        let answer = health.check(Request::new(HealthCheckRequest::default())).await.unwrap();
        let why = answer.metadata().get_bin(WHY_NOT).map(|why| why.to_bytes().unwrap());
        (answer.get_ref().status, why.map(|why| String::from_utf8(why.into()).unwrap()))
    }

    #[tokio::test]
    async fn what_is_not_ready_is_said_with_its_reasons_up_to_the_bound() {
        let (serving, not_serving) = (ServingStatus::Serving as i32, ServingStatus::NotServing as i32);
        let readiness = Readiness::new();
        assert_eq!(check(readiness.clone()).await, (not_serving, Some("nothing is known yet".into())));
        let (signers, pods) = (readiness.condition("signers"), readiness.condition("pods"));
        pods.holds();
        signers.fails("the CA has ended");
        assert_eq!(check(readiness.clone()).await, (not_serving, Some("signers: the CA has ended".into())));
        let room = MAX_WHY_NOT_BYTES - "signers: ".len();
        for (length, said) in [(room, MAX_WHY_NOT_BYTES), (room + 1, MAX_WHY_NOT_BYTES)] {
            signers.fails("x".repeat(length));
            assert_eq!(check(readiness.clone()).await.1.unwrap().len(), said);
        }
        signers.holds();
        assert_eq!(check(readiness).await, (serving, None));
    }
}
