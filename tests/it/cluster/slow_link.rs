//! A TCP link that can be made slow, between the API server and etcd.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, tcp},
    sync::oneshot,
};

use super::server::Server;

/// Every piece that is read is held back for the delay before it is written on.
pub(crate) struct SlowLink {
    delay_millis: Arc<AtomicU64>,
    _server: Server,
}

impl SlowLink {
    pub(super) async fn start(address: Ipv4Addr, from_port: u16, to_port: u16) -> Self {
        let delay_millis = Arc::new(AtomicU64::new(0));
        let (listening, bound) = oneshot::channel();
        let delay = delay_millis.clone();
        let server = Server::start(async move {
            let listener = TcpListener::bind((address, from_port)).await.unwrap();
            let _ = listening.send(());
            loop {
                let (near, _) = listener.accept().await.unwrap();
                tokio::spawn(link(near, (address, to_port).into(), delay.clone()));
            }
        });
        bound.await.expect("the link listens");
        Self { delay_millis, _server: server }
    }

    /// From now on; zero lets everything through at once.
    pub(crate) fn delay(&self, delay: Duration) {
        self.delay_millis.store(delay.as_millis().try_into().unwrap(), Ordering::Relaxed);
    }
}

async fn link(near: TcpStream, far: SocketAddr, delay: Arc<AtomicU64>) {
    let Ok(far) = TcpStream::connect(far).await else { return };
    let ((near_read, near_write), (far_read, far_write)) = (near.into_split(), far.into_split());
    tokio::join!(copy(near_read, far_write, &delay), copy(far_read, near_write, &delay));
}

async fn copy(mut from: tcp::OwnedReadHalf, mut to: tcp::OwnedWriteHalf, delay: &AtomicU64) {
    let mut piece = vec![0; 64 << 10];
    while let Ok(length @ 1..) = from.read(&mut piece).await {
        let delay = Duration::from_millis(delay.load(Ordering::Relaxed));
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        if to.write_all(&piece[..length]).await.is_err() {
            return;
        }
    }
}
