//! The operator's HTTP/1.1 endpoint: `/metrics`, `/livez` and `/readyz`.
//!
//! Off unless an address is configured, because it is plain TCP without authentication; nothing it serves is secret or
//! changes anything. It takes one request a connection, reads no request body, and bounds headers, connections and the
//! time of each connection, so that whoever reaches it can slow down nothing but it. Ready means "can issue":
//! [`Readiness`] is a set of named conditions, each owned by the part that knows, and `/readyz` lists them all.

use std::{borrow::Cow, collections::BTreeMap, convert::Infallible, fmt::Write as _, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{
    Method, Request, Response, StatusCode,
    header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE},
};
use http_body_util::Full;
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::watch,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::metrics::{self, Metrics};

/// Connections served at a time; further ones wait in the listener's backlog.
pub const MAX_CONNECTIONS: usize = 16;
/// Request line and headers together.
pub const MAX_HEADER_BYTES: usize = 8 * 1024;
/// Headers of one request.
pub const MAX_HEADERS: usize = 64;
/// Time for a whole connection, from accepting it to sending the last byte.
pub const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause after a failed `accept(2)`, which fails again at once while descriptors are short.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

const PLAIN_TEXT: &str = "text/plain; charset=utf-8";

/// What the endpoint shows.
#[derive(Clone, Debug)]
pub struct Admin {
    /// Served by `/metrics`.
    pub metrics: Metrics,
    /// Served by `/readyz`.
    pub readiness: Readiness,
}

impl Admin {
    /// Serves until `stop` is cancelled; a request in progress is cut off then.
    pub async fn serve(self, listener: TcpListener, stop: CancellationToken) {
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                Some(_) = connections.join_next() => {}
                accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                    Ok((stream, _)) => {
                        connections.spawn(self.clone().connection(stream));
                    }
                    Err(error) => {
                        tracing::warn!(%error, "the admin endpoint cannot accept a connection");
                        sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
    }

    async fn connection(self, stream: impl AsyncRead + AsyncWrite + Unpin) {
        let admin = Arc::new(self);
        let service = service_fn(|request| {
            let response = admin.respond(&request);
            async { Ok::<_, Infallible>(response) }
        });
        let connection = http1::Builder::new()
            .keep_alive(false)
            .max_header_size(MAX_HEADER_BYTES)
            .max_headers(MAX_HEADERS)
            .serve_connection(TokioIo::new(stream), service);
        // Neither a broken nor a slow client is news to an operator.
        let _ = timeout(CONNECTION_TIMEOUT, connection).await;
    }

    fn respond<B>(&self, request: &Request<B>) -> Response<Full<Bytes>> {
        let (status, content_type, body) = match request.uri().path() {
            "/metrics" => (StatusCode::OK, metrics::CONTENT_TYPE, self.metrics.encode()),
            "/livez" => (StatusCode::OK, PLAIN_TEXT, "ok\n".to_owned()),
            "/readyz" => match self.readiness.check() {
                Ok(report) => (StatusCode::OK, PLAIN_TEXT, report),
                Err(report) => (StatusCode::SERVICE_UNAVAILABLE, PLAIN_TEXT, report),
            },
            _ => (StatusCode::NOT_FOUND, PLAIN_TEXT, "not found; try /metrics, /livez or /readyz\n".to_owned()),
        };
        let known = status != StatusCode::NOT_FOUND;
        // hyper leaves out the body of an answer to HEAD.
        if known && !matches!(*request.method(), Method::GET | Method::HEAD) {
            let mut response = Response::new(Full::from("only GET and HEAD are served\n"));
            *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
            response.headers_mut().insert(ALLOW, http::HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        let mut response = Response::new(Full::from(body));
        *response.status_mut() = status;
        response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static(content_type));
        response.headers_mut().insert(CACHE_CONTROL, http::HeaderValue::from_static("no-store"));
        response
    }
}

type Conditions = BTreeMap<&'static str, Result<(), Cow<'static, str>>>;

/// Whether this process can issue: a set of named conditions that must all hold. Clones share it.
#[derive(Clone, Debug)]
pub struct Readiness(watch::Sender<Conditions>);

impl Readiness {
    /// No conditions yet, and therefore not ready.
    pub fn new() -> Self {
        Self(watch::Sender::default())
    }

    /// Adds a condition, which does not hold until its owner says so.
    pub fn condition(&self, name: &'static str) -> Condition {
        let condition = Condition { name, readiness: self.clone() };
        condition.fails("not checked yet");
        condition
    }

    /// The conditions one a line, as `Ok` when there are some and all of them hold.
    pub fn check(&self) -> Result<String, String> {
        let conditions = self.0.borrow();
        let mut report = String::new();
        for (name, state) in conditions.iter() {
            // Writing to a string does not fail.
            let _ = match state {
                Ok(()) => writeln!(report, "[+] {name}"),
                Err(why) => writeln!(report, "[-] {name}: {why}"),
            };
        }
        if ready(&conditions) { Ok(report + "ready\n") } else { Err(report + "not ready\n") }
    }

    /// Returns when it is as `wanted`; at once when it is already.
    pub async fn becomes(&self, wanted: bool) {
        let seen = self.0.subscribe().wait_for(|conditions| ready(conditions) == wanted).await.map(drop);
        seen.expect("self keeps the channel open");
    }
}

impl Default for Readiness {
    fn default() -> Self {
        Self::new()
    }
}

fn ready(conditions: &Conditions) -> bool {
    !conditions.is_empty() && conditions.values().all(Result::is_ok)
}

/// One condition, held by the part that knows whether it is true. It keeps its last state when this is dropped.
#[derive(Debug)]
pub struct Condition {
    name: &'static str,
    readiness: Readiness,
}

impl Condition {
    /// The condition is true.
    pub fn holds(&self) {
        self.set(Ok(()));
    }

    /// The condition is not true; `why` is one line for operators.
    pub fn fails(&self, why: impl Into<Cow<'static, str>>) {
        self.set(Err(why.into()));
    }

    fn set(&self, state: Result<(), Cow<'static, str>>) {
        self.readiness.0.send_if_modified(|conditions| {
            let unchanged = conditions.get(self.name) == Some(&state);
            conditions.insert(self.name, state);
            !unchanged
        });
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, duplex},
        net::TcpStream,
        time::Instant,
    };

    use super::*;

    struct Running {
        address: SocketAddr,
        readiness: Readiness,
        stop: CancellationToken,
    }

    impl Running {
        async fn start() -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let readiness = Readiness::new();
            let stop = CancellationToken::new();
            let admin = Admin { metrics: Metrics::new(), readiness: readiness.clone() };
            tokio::spawn(admin.serve(listener, stop.clone()));
            Self { address, readiness, stop }
        }

        /// Sends `request` as it is and reads to the end of the connection.
        async fn send(&self, request: &str) -> String {
            let mut stream = TcpStream::connect(self.address).await.unwrap();
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut answer = String::new();
            // A reset after an early answer is as good as an end.
            let _ = stream.read_to_string(&mut answer).await;
            answer
        }

        async fn check(&self, request_line: &str, status: &str, header: &str, body: &str) {
            let answer = self.send(&format!("{request_line} HTTP/1.1\r\nhost: localhost\r\n\r\n")).await;
            let (head, sent) = answer.split_once("\r\n\r\n").expect("a complete head");
            assert!(head.starts_with(&format!("HTTP/1.1 {status}")), "{request_line}: {head}");
            assert!(head.contains(header), "{request_line}: {head}");
            assert!(sent.contains(body) && (sent.is_empty() == body.is_empty()), "{request_line}: {sent}");
        }
    }

    impl Drop for Running {
        fn drop(&mut self) {
            self.stop.cancel();
        }
    }

    #[tokio::test]
    async fn each_path_and_method_has_its_answer() {
        let running = Running::start().await;
        running.check("GET /livez", "200", "content-type: text/plain", "ok\n").await;
        running.check("GET /metrics", "200", metrics::CONTENT_TYPE, "csrd_build_info{").await;
        running.check("GET /metrics?x=1", "200", metrics::CONTENT_TYPE, "# EOF\n").await;
        running.check("HEAD /metrics", "200", metrics::CONTENT_TYPE, "").await;
        running.check("POST /metrics", "405", "allow: GET, HEAD", "only GET").await;
        running.check("DELETE /readyz", "405", "allow: GET, HEAD", "only GET").await;
        running.check("GET /", "404", "content-type: text/plain", "not found").await;
        running.check("GET /livez/", "404", "cache-control: no-store", "not found").await;
        running.check("POST /x", "404", "", "not found").await;
    }

    #[tokio::test]
    async fn ready_means_that_every_condition_holds_and_the_body_says_which_does_not() {
        let running = Running::start().await;
        running.check("GET /readyz", "503", "", "not ready\n").await;
        let policy = running.readiness.condition("policy");
        let signer = running.readiness.condition("signer");
        running.check("GET /readyz", "503", "", "[-] policy: not checked yet\n[-] signer: not checked yet\nnot").await;
        policy.holds();
        signer.fails(format!("the CA ended {} days ago", 3));
        running.check("GET /readyz", "503", "", "[+] policy\n[-] signer: the CA ended 3 days ago\nnot ready\n").await;
        signer.holds();
        running.check("GET /readyz", "200", "", "[+] policy\n[+] signer\nready\n").await;
        running.readiness.becomes(true).await;
        let becomes = tokio::spawn({
            let readiness = running.readiness.clone();
            async move { readiness.becomes(false).await }
        });
        policy.fails("reload failed");
        becomes.await.unwrap();
    }

    #[tokio::test]
    async fn headers_are_bounded_in_size_and_number() {
        let running = Running::start().await;
        let sized = |size: usize| {
            let head = "GET /livez HTTP/1.1\r\nx: ";
            format!("{head}{}\r\n\r\n", "a".repeat(size - head.len() - 4))
        };
        assert!(running.send(&sized(MAX_HEADER_BYTES)).await.starts_with("HTTP/1.1 200"));
        assert!(running.send(&sized(MAX_HEADER_BYTES + 1)).await.starts_with("HTTP/1.1 431"));
        let counted = |count| format!("GET /livez HTTP/1.1\r\n{}\r\n", "x: y\r\n".repeat(count));
        assert!(running.send(&counted(MAX_HEADERS)).await.starts_with("HTTP/1.1 200"));
        assert!(running.send(&counted(MAX_HEADERS + 1)).await.starts_with("HTTP/1.1 431"));
        assert!(running.send("\0\0\0\0 garbage\r\n\r\n").await.starts_with("HTTP/1.1 400"));
    }

    #[tokio::test]
    async fn a_connection_carries_one_request() {
        let running = Running::start().await;
        let request = "GET /livez HTTP/1.1\r\n\r\n";
        assert_eq!(running.send(&request.repeat(2)).await.matches("HTTP/1.1").count(), 1);
    }

    #[tokio::test]
    async fn a_connection_over_the_limit_waits_for_a_place() {
        let running = Running::start().await;
        let mut held = Vec::new();
        for _ in 0..MAX_CONNECTIONS {
            held.push(TcpStream::connect(running.address).await.unwrap());
        }
        let waiting = running.send("GET /livez HTTP/1.1\r\n\r\n");
        tokio::pin!(waiting);
        assert!(timeout(Duration::from_millis(200), &mut waiting).await.is_err(), "no place is free");
        drop(held.pop());
        assert!(waiting.await.starts_with("HTTP/1.1 200"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_never_finishes_writing_or_never_reads_is_cut_off() {
        for request in ["GET /li", "GET /metrics HTTP/1.1\r\n\r\n"] {
            let admin = Admin { metrics: Metrics::new(), readiness: Readiness::new() };
            let (mut client, server) = duplex(64);
            client.write_all(request.as_bytes()).await.unwrap();
            let start = Instant::now();
            admin.connection(server).await;
            assert_eq!(start.elapsed(), CONNECTION_TIMEOUT, "{request}");
        }
    }

    #[tokio::test]
    async fn stopping_ends_open_connections() {
        let running = Running::start().await;
        let mut stream = TcpStream::connect(running.address).await.unwrap();
        stream.write_all(b"GET").await.unwrap();
        running.stop.cancel();
        assert_eq!(stream.read(&mut [0; 16]).await.unwrap_or(0), 0);
    }
}
