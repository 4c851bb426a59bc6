//! The do-nothing server that ours is held against.

use std::pin::Pin;

use csrd::proto::v1::{self, certificate_service_server as service, subscribe_response::Event};
use tokio_stream::{Stream, StreamExt as _, wrappers::UnixListenerStream};
use tonic::{Request, Response, Status};

/// First argument of this binary when it is to be the floor.
pub(crate) const ARGUMENT: &str = "--floor";

struct Floor;

/// Serves canned answers until it is killed.
pub(crate) fn serve(socket: &str) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let listener = tokio::net::UnixListener::bind(socket).expect("a socket");
        let service = service::CertificateServiceServer::new(Floor);
        let server = tonic::transport::Server::builder().add_service(service);
        server.serve_with_incoming(UnixListenerStream::new(listener)).await.expect("serving");
    });
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl service::CertificateService for Floor {
    type IssueCertificateStream = Answers<v1::IssueCertificateResponse>;
    type SubscribeStream = Answers<v1::SubscribeResponse>;
    type WatchTrustBundleStream = Answers<v1::WatchTrustBundleResponse>;

    async fn who_am_i(&self, _: Request<v1::WhoAmIRequest>) -> Result<Response<v1::WhoAmIResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn issue_certificate(
        &self,
        _: Request<v1::IssueCertificateRequest>,
    ) -> Result<Response<Self::IssueCertificateStream>, Status> {
        Err(Status::unimplemented(""))
    }

    /// One answer of the size of ours, then nothing.
    async fn subscribe(&self, _: Request<v1::SubscribeRequest>) -> Result<Response<Self::SubscribeStream>, Status> {
        let certificate = v1::Certificate {
            certificate_id: "0".repeat(32),
            sequence: 1,
            certificate_chain: vec![7; 800].into(),
            private_key: vec![1; 241].into(),
            trust_bundle: vec![2; 640].into(),
            serial_number: "0".repeat(32),
            ..Default::default()
        };
        let event = Some(Event::Current(v1::Current { certificate: Some(certificate) }));
        let first = Ok(v1::SubscribeResponse { sequence: 1, event });
        Ok(Response::new(Box::pin(tokio_stream::once(first).chain(tokio_stream::pending()))))
    }

    async fn watch_trust_bundle(
        &self,
        _: Request<v1::WatchTrustBundleRequest>,
    ) -> Result<Response<Self::WatchTrustBundleStream>, Status> {
        Err(Status::unimplemented(""))
    }
}
