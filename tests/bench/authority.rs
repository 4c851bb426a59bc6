//! What the authority adapter costs clients that do not need it: the same calls to the same service with and without it.

use std::{convert::Infallible, time::Instant};

use csrd::server::authority::AuthorityStream;
use hyper::{Request, body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{UnixListener, UnixStream},
};
use tonic::{service::Routes, transport::Endpoint};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tower::Service as _;

use crate::table::{Table, percentile};

/// Calls of one measurement.
const CALLS: usize = 10_000;

/// One call at a time over a real socket; halves alternate, so that a slow moment of the machine meets both.
pub(crate) async fn adapter(table: &mut Table) {
    let (mut without, mut with) = (Vec::new(), Vec::new());
    for _ in 0..2 {
        measure(|stream| stream, &mut without).await;
        measure(AuthorityStream::new, &mut with).await;
    }
    without.sort_by(f64::total_cmp);
    with.sort_by(f64::total_cmp);
    let (floor, ours) = (percentile(&without, 50), percentile(&with, 50));
    table.beside("a call without and with the authority adapter: p50", "ms", floor, ours, "no difference");
}

/// Appends each call's milliseconds.
async fn measure<IO>(adapt: impl FnOnce(UnixStream) -> IO, times: &mut Vec<f64>)
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("s");
    let listener = UnixListener::bind(&path).expect("a socket");
    let connected = Endpoint::from_shared(format!("unix://{}", path.display())).expect("a unix address");
    let connected = tokio::spawn(async move { connected.connect().await.expect("a connection") });
    let (stream, _) = listener.accept().await.expect("a connection");
    let (_, health) = tonic_health::server::health_reporter();
    let routes = Routes::new(health).prepare();
    let service = service_fn(move |request: Request<Incoming>| {
        let answer = routes.clone().call(request);
        async move { Ok::<_, Infallible>(answer.await.expect("routes never fail")) }
    });
    let served = http2::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(adapt(stream)), service);
    let served = tokio::spawn(served);
    let mut client = HealthClient::new(connected.await.expect("the task lives"));
    for call in 0..CALLS + 500 {
        let began = Instant::now();
        client.check(HealthCheckRequest::default()).await.expect("an answer");
        if call >= 500 {
            times.push(began.elapsed().as_secs_f64() * 1e3);
        }
    }
    served.abort();
}
