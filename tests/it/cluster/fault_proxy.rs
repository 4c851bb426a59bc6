//! A proxy before the API server that fails as a test says.
//!
//! It has a certificate of the cluster's CA, so clients take it for the API server. A bearer token is passed on; a caller
//! without one is passed on with the credentials that the proxy was started with, since a client certificate ends where
//! its TLS ends. It counts what it saw, what it answered itself included.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, combinators::UnsyncBoxBody};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use kube::{Client, client::Body, config::Config};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use serde_json::{Value, json};
use tokio::{
    net::TcpListener,
    sync::{broadcast, oneshot},
};
use tokio_rustls::TlsAcceptor;

use super::{
    ControlPlane,
    access::{Access, Identity},
    pki::Leaf,
    server::Server,
};

/// What happens to a request instead of being passed on at once.
#[derive(Clone)]
pub(crate) enum Fault {
    /// Answered here.
    Answer { status: u16, headers: Vec<(&'static str, String)>, body: Value },
    /// Passed on after a while.
    Delay(Duration),
    /// Never answered.
    Hang,
    /// Passed on, and the connection is closed in place of the answer: the caller cannot know what became of it.
    LoseAnswer,
}

impl Fault {
    /// An error as the API server words it.
    pub(crate) fn status(status: u16, reason: &str, message: &str) -> Self {
        let body = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": status,
            "reason": reason, "message": message});
        Self::Answer { status, headers: vec![], body }
    }

    /// What an overloaded API server says.
    pub(crate) fn too_many_requests(retry_after_seconds: u32) -> Self {
        let body = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": 429,
            "reason": "TooManyRequests", "message": "the server has received too many requests",
            "details": {"retryAfterSeconds": retry_after_seconds}});
        Self::Answer { status: 429, headers: vec![("retry-after", retry_after_seconds.to_string())], body }
    }

    /// A watch that starts and says at once that its resource version is too old.
    pub(crate) fn too_old() -> Self {
        let body = json!({"type": "ERROR", "object": {"kind": "Status", "apiVersion": "v1", "metadata": {},
            "status": "Failure", "code": 410, "reason": "Expired", "message": "too old resource version: 1 (2)"}});
        Self::Answer { status: 200, headers: vec![], body }
    }
}

struct Rule {
    method: Method,
    /// Found in the path and query.
    piece: String,
    times: usize,
    fault: Fault,
}

/// One request that came: method, path and query.
pub(crate) type Seen = (Method, String);

struct Script {
    rules: Mutex<Vec<Rule>>,
    seen: Mutex<Vec<Seen>>,
    cut: broadcast::Sender<()>,
    upstream: Upstream,
}

/// Made on the proxy's own runtime: a client lives on the one it was made on.
struct Upstream {
    /// For those who bring a token.
    bare: Client,
    fallback: Client,
}

pub(crate) struct FaultProxy {
    /// The way through the proxy.
    pub(crate) access: Access,
    script: Arc<Script>,
    _server: Server,
}

impl FaultProxy {
    /// Before `cluster`, with `fallback` for callers without a token.
    pub(crate) async fn start(cluster: &ControlPlane, fallback: &Identity) -> Self {
        let Leaf { certificate, key } = cluster.server_certificate();
        let tls = rustls::ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(
                vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()],
                PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap(),
            )
            .unwrap();
        let (bare, fallback) =
            (cluster.access.config(&Identity::Anonymous).await, cluster.access.config(fallback).await);
        let (listening, bound) = oneshot::channel();
        let address = cluster.address;
        let server = Server::start(async move {
            let listener = TcpListener::bind((address, 0)).await.unwrap();
            let client = |mut config: Config| {
                config.default_retry = false;
                Client::try_from(config).unwrap()
            };
            let script = Arc::new(Script {
                rules: Mutex::default(),
                seen: Mutex::default(),
                cut: broadcast::Sender::new(1),
                upstream: Upstream { bare: client(bare), fallback: client(fallback) },
            });
            let _ = listening.send((listener.local_addr().unwrap(), script.clone()));
            serve(listener, TlsAcceptor::from(Arc::new(tls)), script).await;
        });
        let (address, script) = bound.await.expect("the proxy listens");
        let access = Access {
            url: format!("https://{address}"),
            ca_certificate: cluster.access.ca_certificate.clone(),
            folder: cluster.access.folder.clone(),
        };
        Self { access, script, _server: server }
    }

    /// The next `times` requests with this method, and `piece` in their path and query, meet `fault`. Rules are looked
    /// at in the order they were made; one that is used up lets the next one match.
    pub(crate) fn fail(&self, method: Method, piece: &str, times: usize, fault: Fault) {
        self.script.rules.lock().unwrap().push(Rule { method, piece: piece.into(), times, fault });
    }

    /// Forgets every rule. Requests that hang already go on hanging; see [`Self::cut`].
    pub(crate) fn heal(&self) {
        self.script.rules.lock().unwrap().clear();
    }

    /// Closes every connection, whatever is on it: open watches, answers on their way, requests that hang.
    pub(crate) fn cut(&self) {
        let _ = self.script.cut.send(());
    }

    /// Every request so far.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.script.seen.lock().unwrap().clone()
    }
}

async fn serve(listener: TcpListener, tls: TlsAcceptor, script: Arc<Script>) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let (tls, script, mut cut) = (tls.clone(), script.clone(), script.cut.subscribe());
        tokio::spawn(async move {
            let Ok(stream) = tls.accept(stream).await else { return };
            let service = service_fn(move |request| {
                let script = script.clone();
                async move { script.answer(request).await.ok_or(Closed) }
            });
            let served = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                _ = served => {}
                _ = cut.recv() => {}
            }
        });
    }
}

/// The answer that closes the connection.
#[derive(Debug, thiserror::Error)]
#[error("closed by the script")]
struct Closed;

type Answer = Response<UnsyncBoxBody<Bytes, kube::Error>>;

impl Script {
    /// Nothing closes the connection.
    async fn answer(&self, request: Request<Incoming>) -> Option<Answer> {
        match self.note(&request) {
            None => self.pass_on(request).await,
            Some(Fault::Delay(delay)) => {
                tokio::time::sleep(delay).await;
                self.pass_on(request).await
            }
            Some(Fault::Hang) => std::future::pending().await,
            Some(Fault::LoseAnswer) => {
                self.pass_on(request).await?.into_body().collect().await.ok();
                None
            }
            Some(Fault::Answer { status, headers, body }) => {
                let mut answer = Response::builder()
                    .status(StatusCode::from_u16(status).unwrap())
                    .header(header::CONTENT_TYPE, "application/json");
                for (name, value) in headers {
                    answer = answer.header(name, value);
                }
                let body = Full::new(Bytes::from(format!("{body}\n"))).map_err(|never: Infallible| match never {});
                Some(answer.body(body.boxed_unsync()).unwrap())
            }
        }
    }

    fn note(&self, request: &Request<Incoming>) -> Option<Fault> {
        let target = request.uri().path_and_query().map_or("", |it| it.as_str()).to_owned();
        self.seen.lock().unwrap().push((request.method().clone(), target.clone()));
        let mut rules = self.rules.lock().unwrap();
        let rule = rules
            .iter_mut()
            .find(|rule| rule.times > 0 && rule.method == *request.method() && target.contains(&rule.piece))?;
        rule.times -= 1;
        Some(rule.fault.clone())
    }

    async fn pass_on(&self, request: Request<Incoming>) -> Option<Answer> {
        let (mut parts, body) = request.into_parts();
        parts.headers.remove(header::HOST);
        parts.headers.remove(header::CONNECTION);
        let client = match parts.headers.contains_key(header::AUTHORIZATION) {
            true => &self.upstream.bare,
            false => &self.upstream.fallback,
        };
        let body = body.collect().await.ok()?.to_bytes();
        let answer = client.send(Request::from_parts(parts, Body::from(body.to_vec()))).await.ok()?;
        let (mut parts, body) = answer.into_parts();
        parts.headers.remove(header::TRANSFER_ENCODING);
        Some(Response::from_parts(parts, body.boxed_unsync()))
    }
}
