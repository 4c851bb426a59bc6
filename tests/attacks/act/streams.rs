//! Streams of calls: subscriptions that stay, and an Envoy that accepts nothing.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use csrd::proto::{
    envoy::service::{
        discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest},
        secret::v3::secret_discovery_service_client::SecretDiscoveryServiceClient,
    },
    google::rpc,
};
use futures_util::stream::{self, BoxStream, StreamExt as _};
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};
use tonic::{Status, transport::Channel};

use super::{
    Did, Orders,
    calls::{PER_CONNECTION, subscribed},
    channel, connect,
};

const TYPE_URL: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";

type Sds = SecretDiscoveryServiceClient<Channel>;

/// Subscriptions that one connection asks for at once.
const AT_ONCE: usize = 8;
/// Before what was refused is tried again.
const PAUSE: Duration = Duration::from_millis(500);

/// Holds `many` subscriptions, each for a name of its own, until the time is over.
pub(super) async fn subscribe(orders: &Orders) -> Did {
    let mut connections = JoinSet::new();
    for begin in (0..orders.many).step_by(PER_CONNECTION) {
        let orders = orders.clone();
        connections.spawn(async move {
            let mut lost = 0;
            let client = loop {
                match timeout(orders.left(), connect(&orders)).await {
                    Ok(Ok(client)) => break client,
                    Ok(Err(_)) => lost += 1,
                    Err(_) => return Did { refused: lost, ..Did::default() },
                }
                sleep(PAUSE.min(orders.left())).await;
            };
            let asked = stream::iter(begin..orders.many.min(begin + PER_CONNECTION)).map(|number| {
                let (mut client, orders) = (client.clone(), orders.clone());
                async move {
                    let mut refused = 0;
                    while !orders.over() {
                        let name = format!("s{number}-{}.member.test", std::process::id());
                        match timeout(orders.left(), subscribed(&mut client, &name)).await {
                            Ok(Ok(stream)) => return (Some(stream), refused),
                            Ok(Err(_)) => refused += 1,
                            Err(_) => break,
                        }
                        sleep(PAUSE.min(orders.left())).await;
                    }
                    (None, refused)
                }
            });
            let held: Vec<_> = asked.buffer_unordered(AT_ONCE).collect().await;
            sleep(orders.left()).await;
            let done = held.iter().filter(|(stream, _)| stream.is_some()).count() as u64;
            let refused = lost + held.iter().map(|(_, refused)| refused).sum::<u64>();
            Did { done, refused, open: done, ..Did::default() }
        });
    }
    let mut did = Did::default();
    for one in connections.join_all().await {
        did += one;
    }
    did
}

fn error() -> Option<rpc::Status> {
    Some(rpc::Status { code: 13, message: "not this one".into(), details: Vec::new() })
}

/// One stream of `StreamSecrets` on which every request says that the last response was no good.
pub(super) async fn nack(orders: &Orders) -> Did {
    nacked(orders, |mut client, numbers| async move {
        let requests = numbers.map(|number| DiscoveryRequest {
            type_url: TYPE_URL.into(),
            resource_names: vec!["default".into()],
            response_nonce: if number == 0 { String::new() } else { "1".into() },
            error_detail: if number == 0 { None } else { error() },
            ..Default::default()
        });
        let mut answers = client.stream_secrets(requests).await?.into_inner();
        while answers.message().await?.is_some() {}
        Ok(())
    })
    .await
}

/// The same with `DeltaSecrets`.
pub(super) async fn nack_delta(orders: &Orders) -> Did {
    nacked(orders, |mut client, numbers| async move {
        let requests = numbers.map(|number| DeltaDiscoveryRequest {
            type_url: TYPE_URL.into(),
            resource_names_subscribe: if number == 0 { vec!["default".into()] } else { Vec::new() },
            response_nonce: if number == 0 { String::new() } else { "1".into() },
            error_detail: if number == 0 { None } else { error() },
            ..Default::default()
        });
        let mut answers = client.delta_secrets(requests).await?.into_inner();
        while answers.message().await?.is_some() {}
        Ok(())
    })
    .await
}

/// Sends on one stream as fast as it takes requests, and on the next when it ends.
async fn nacked<F>(orders: &Orders, open: impl Fn(Sds, BoxStream<'static, u64>) -> F) -> Did
where
    F: Future<Output = Result<(), Status>>,
{
    let sent = Arc::new(AtomicU64::new(0));
    let mut refused = 0;
    while !orders.over() {
        if let Ok(Ok(channel)) = timeout(orders.left(), channel(orders)).await {
            let counter = sent.clone();
            let numbers = stream::iter(0..u64::MAX).inspect(move |_| _ = counter.fetch_add(1, Ordering::Relaxed));
            if timeout(orders.left(), open(Sds::new(channel), numbers.boxed())).await.is_err() {
                break;
            }
        }
        refused += 1;
        sleep(Duration::from_millis(10)).await;
    }
    Did { done: sent.load(Ordering::Relaxed), refused, open: 1, ..Did::default() }
}
