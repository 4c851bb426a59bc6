//! Calls over and over.

use std::{
    future::Future,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use csrd::proto::v1;
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};
use tonic::Status;

use super::{Client, Did, Orders, connect};

/// Calls of one connection at once: fewer than an agent lets a connection have.
pub(super) const PER_CONNECTION: usize = 64;

/// Keeps `many` calls under way until the time is over.
async fn flood<F>(orders: &Orders, call: impl Fn(Client, u64) -> F + Clone + Send + 'static) -> Did
where
    F: Future<Output = Result<(), Status>> + Send + 'static,
{
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let mut tasks = JoinSet::new();
    for begin in (0..orders.many).step_by(PER_CONNECTION) {
        let (orders, call) = (orders.clone(), call.clone());
        let calls = PER_CONNECTION.min(orders.many - begin);
        tasks.spawn(async move {
            let mut did = Did::default();
            let mut connected: Option<Client> = None;
            while !orders.over() {
                // Lost connections are made anew.
                let client = match connected.take() {
                    Some(client) => client,
                    None => match timeout(Duration::from_secs(5), connect(&orders)).await {
                        Ok(Ok(client)) => client,
                        _ => {
                            did.refused += 1;
                            sleep(Duration::from_millis(10)).await;
                            continue;
                        }
                    },
                };
                let mut round = JoinSet::new();
                for _ in 0..calls {
                    let (orders, call, client) = (orders.clone(), call.clone(), client.clone());
                    round.spawn(async move {
                        let mut did = Did::default();
                        while !orders.over() {
                            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
                            match timeout(orders.left(), call(client.clone(), number)).await {
                                Ok(Ok(())) => did.done += 1,
                                Ok(Err(status)) => {
                                    did.refused += 1;
                                    if status.code() == tonic::Code::Unavailable {
                                        sleep(Duration::from_millis(10)).await;
                                    }
                                }
                                Err(_) => break,
                            }
                        }
                        did
                    });
                }
                for one in round.join_all().await {
                    did += one;
                }
                connected = Some(client);
            }
            did
        });
    }
    let mut did = Did::default();
    for one in tasks.join_all().await {
        did += one;
    }
    Did { open: orders.many as u64, ..did }
}

/// New certificates, each for another name, by a user with a policy.
pub(super) async fn issue(orders: &Orders) -> Did {
    flood(orders, |client, number| issued(client, format!("n{number}-{}.member.test", std::process::id()))).await
}

/// Certificates for a user without a policy.
pub(super) async fn refused(orders: &Orders) -> Did {
    flood(orders, |client, _| issued(client, "x.outsider.test".to_owned())).await
}

async fn issued(mut client: Client, name: String) -> Result<(), Status> {
    let request = v1::CertificateRequest { dns_names: vec![name], ..Default::default() };
    let request = v1::IssueCertificateRequest { request: Some(request) };
    let mut answers = client.issue_certificate(request).await?.into_inner();
    while answers.message().await?.is_some() {}
    Ok(())
}

pub(super) async fn who_am_i(orders: &Orders) -> Did {
    flood(orders, |mut client, _| async move { client.who_am_i(v1::WhoAmIRequest {}).await.map(drop) }).await
}

/// A newcomer's first subscription.
pub(super) async fn first(orders: &Orders) -> Result<(), Status> {
    let mut client = connect(orders).await?;
    subscribed(&mut client, "first.newcomer.test").await.map(drop)
}

/// A subscription with its first certificate.
pub(super) async fn subscribed(
    client: &mut Client,
    name: &str,
) -> Result<tonic::Streaming<v1::SubscribeResponse>, Status> {
    let request = v1::CertificateRequest { dns_names: vec![name.to_owned()], ..Default::default() };
    let request = v1::SubscribeRequest { request: Some(request), ..Default::default() };
    let mut answers = client.subscribe(request).await?.into_inner();
    answers.message().await?.ok_or_else(|| Status::unavailable("no answer"))?;
    Ok(answers)
}
