//! The operator's HTTP/1.1 endpoint: `/metrics`, `/livez` and `/readyz`.
//!
//! Off unless an address is configured, because it is plain TCP without authentication; nothing it serves is secret or
//! changes anything. It takes one request a connection, reads no request body, and bounds headers, connections and the
//! time of each connection, so that a client can slow down nothing but this endpoint. It always accepts: when all places
//! are taken, the oldest connection without a request gives up its own. A stranger who connects fast enough can still
//! keep others out, so probes that restart a process use `csrd health` instead. Ready means "can issue": [`Readiness`]
//! is a set of named conditions, each owned by the part that knows, and `/readyz` lists them all.

use std::{
    borrow::Cow,
    collections::{BTreeMap, VecDeque},
    convert::Infallible,
    fmt::Write as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{
    Method, Request, Response, StatusCode,
    header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE},
};
use http_body_util::Full;
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::watch,
    task::{AbortHandle, JoinSet, yield_now},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::metrics::{self, Metrics};

/// Connections held at a time; one more takes the place of the oldest silent one, else of the oldest.
pub const MAX_CONNECTIONS: usize = 16;
/// Request line and headers together.
pub const MAX_HEADER_BYTES: usize = 8 * 1024;
/// Headers of one request.
pub const MAX_HEADERS: usize = 64;
/// Time from accepting a connection to the end of its request's headers.
pub const HEADER_TIMEOUT: Duration = Duration::from_secs(1);
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
        let mut connections = Connections::default();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                Some(_) = connections.tasks.join_next() => {}
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => {
                        connections.admit(&self, stream);
                        // A request that is already here is read before further connections can push it out.
                        yield_now().await;
                    }
                    Err(error) => {
                        tracing::warn!(%error, "the admin endpoint cannot accept a connection");
                        sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
    }

    /// Serves one connection; `asked` becomes true at the end of its request's headers.
    async fn connection(self, stream: impl AsyncRead + AsyncWrite + Unpin, asked: Arc<AtomicBool>) {
        let admin = Arc::new(self);
        let service = service_fn(|request| {
            asked.store(true, Ordering::Relaxed);
            let response = admin.respond(&request);
            async { Ok::<_, Infallible>(response) }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIMEOUT)
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

/// Connections under way.
#[derive(Default)]
struct Connections {
    tasks: JoinSet<()>,
    /// At most [`MAX_CONNECTIONS`], the oldest first.
    places: VecDeque<Place>,
}

struct Place {
    /// Whether its request's headers are there.
    asked: Arc<AtomicBool>,
    task: AbortHandle,
}

impl Connections {
    /// Serves one more, in the place of another if all are taken.
    fn admit(&mut self, admin: &Admin, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        while self.tasks.try_join_next().is_some() {}
        self.places.retain(|place| !place.task.is_finished());
        if self.places.len() >= MAX_CONNECTIONS {
            let silent = self.places.iter().position(|place| !place.asked.load(Ordering::Relaxed));
            // Where all are being answered, the oldest has had the most time for it.
            if let Some(place) = self.places.remove(silent.unwrap_or(0)) {
                place.task.abort();
            }
        }
        let asked = Arc::new(AtomicBool::new(false));
        let task = self.tasks.spawn(admin.clone().connection(stream, asked.clone()));
        self.places.push_back(Place { asked, task });
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

    /// The conditions that do not hold, in one line; `None` if it is ready.
    pub fn why_not(&self) -> Option<String> {
        let conditions = self.0.borrow();
        let failing = conditions.iter().filter_map(|(name, state)| Some(format!("{name}: {}", state.as_ref().err()?)));
        let failing = failing.collect::<Vec<_>>().join("; ");
        (!ready(&conditions)).then(|| if failing.is_empty() { "nothing is known yet".to_owned() } else { failing })
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
        io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
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

    /// Connections in memory, whose time is the test's.
    struct Crowd {
        admin: Admin,
        connections: Connections,
    }

    impl Crowd {
        fn new() -> Self {
            let admin = Admin { metrics: Metrics::new(), readiness: Readiness::new() };
            Self { admin, connections: Connections::default() }
        }

        /// A connection whose client has sent this, and which the server has read; it holds 64 bytes on their way.
        async fn connect(&mut self, sent: &str) -> DuplexStream {
            let (mut client, server) = duplex(64);
            client.write_all(sent.as_bytes()).await.unwrap();
            self.connections.admit(&self.admin, server);
            yield_now().await;
            client
        }
    }

    async fn read(mut client: DuplexStream) -> String {
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        answer
    }

    const LIVEZ: &str = "GET /livez HTTP/1.1\r\n\r\n";
    const METRICS: &str = "GET /metrics HTTP/1.1\r\n\r\n";

    #[tokio::test(start_paused = true)]
    async fn idle_connections_of_any_number_do_not_delay_a_request() {
        for number in [MAX_CONNECTIONS - 1, MAX_CONNECTIONS, MAX_CONNECTIONS + 1, 34, 500] {
            for sent in ["", "GET /li"] {
                let (mut crowd, mut idle, start) = (Crowd::new(), Vec::new(), Instant::now());
                for _ in 0..number {
                    idle.push(crowd.connect(sent).await);
                    assert!(crowd.connections.places.len() <= MAX_CONNECTIONS);
                }
                let client = crowd.connect(LIVEZ).await;
                assert!(read(client).await.starts_with("HTTP/1.1 200"));
                assert_eq!(start.elapsed(), Duration::ZERO, "{number} idle connections that sent {sent:?}");
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_connection_past_the_bound_takes_the_place_of_the_oldest_silent_one() {
        let mut crowd = Crowd::new();
        let mut held = vec![crowd.connect(METRICS).await];
        while held.len() < MAX_CONNECTIONS {
            held.push(crowd.connect("GET").await);
        }
        assert_eq!(crowd.connections.tasks.len(), MAX_CONNECTIONS);
        held.push(crowd.connect("").await);
        assert_eq!(crowd.connections.places.len(), MAX_CONNECTIONS);
        assert_eq!(read(held.remove(1)).await, "", "the oldest silent one");
        assert!(held[1].write_all(b" /livez HTTP/1.1\r\n\r\n").await.is_ok());
        assert!(read(held.remove(1)).await.starts_with("HTTP/1.1 200"), "the next one is still heard");
        assert!(read(held.remove(0)).await.ends_with("# EOF\n"), "one that is being answered is older, and stays");
    }

    #[tokio::test(start_paused = true)]
    async fn where_all_are_being_answered_the_oldest_gives_way() {
        let mut crowd = Crowd::new();
        let mut held = Vec::new();
        for _ in 0..=MAX_CONNECTIONS {
            held.push(crowd.connect(METRICS).await);
        }
        assert!(!read(held.remove(0)).await.ends_with("# EOF\n"), "cut off");
        for answered in held {
            assert!(read(answered).await.ends_with("# EOF\n"));
        }
    }

    #[tokio::test]
    async fn idle_connections_on_the_port_leave_room_for_a_probe() {
        let running = Running::start().await;
        let mut idle = Vec::new();
        // Descriptors are short in a process of many tests.
        for _ in 0..4 * MAX_CONNECTIONS {
            idle.push(TcpStream::connect(running.address).await.unwrap());
        }
        for _ in 0..MAX_CONNECTIONS {
            running.check("GET /livez", "200", "", "ok\n").await;
        }
        drop(idle);
    }

    #[tokio::test(start_paused = true)]
    async fn a_header_has_a_second_and_a_reader_the_time_of_the_connection() {
        async fn check(sent: &str, expected: Duration) {
            let mut crowd = Crowd::new();
            let start = Instant::now();
            let _client = crowd.connect(sent).await;
            crowd.connections.tasks.join_next().await;
            assert_eq!(start.elapsed(), expected, "{sent:?}");
        }
        check("", HEADER_TIMEOUT).await;
        check("GET /li", HEADER_TIMEOUT).await;
        check("GET /livez HTTP/1.1\r\nhost: localhost\r\n", HEADER_TIMEOUT).await;
        check(METRICS, CONNECTION_TIMEOUT).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_header_that_comes_in_drops_has_no_longer() {
        let (mut crowd, start) = (Crowd::new(), Instant::now());
        let mut client = crowd.connect("G").await;
        let drops = async {
            while client.write_all(b"E").await.is_ok() {
                sleep(HEADER_TIMEOUT / 10).await;
            }
        };
        tokio::select! {
            biased;
            _ = crowd.connections.tasks.join_next() => {}
            () = drops => panic!("the server has closed its end and says that it has not"),
        }
        assert_eq!(start.elapsed(), HEADER_TIMEOUT);
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
