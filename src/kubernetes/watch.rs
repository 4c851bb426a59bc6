//! One watch, for as long as somebody follows it: every change, and after each list the whole.

use std::{fmt::Debug, pin::pin};

use futures_util::StreamExt as _;
use kube::{
    Api, Resource,
    runtime::{
        WatchStreamExt as _,
        watcher::{self, Event},
    },
};
use serde::de::DeserializeOwned;

use super::WatchBackoff;

/// What has happened to objects of one kind.
#[derive(Debug)]
pub enum Change<T> {
    /// One is new or other than it was.
    Put(T),
    /// One is gone.
    Gone(T),
    /// These are all.
    All(Vec<T>),
    /// The API server does not say, for this reason; what is known stays.
    Silent(String),
    /// The API server does not serve this kind, as it says in these words.
    NotServed(String),
}

/// What has come of one watch.
#[derive(Debug, Default)]
pub struct Told {
    /// Whether all has been listed once.
    listed: bool,
    /// Why nothing comes, if nothing does.
    silent: Option<String>,
}

/// Hands over each change, for ever. Each object is cut down by `read` as soon as it arrives.
pub async fn follow<K, T>(
    api: Api<K>,
    config: watcher::Config,
    backoff: WatchBackoff,
    read: fn(K) -> T,
    mut apply: impl FnMut(Change<T>),
) where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let (mut listed, mut silent) = (Vec::new(), false);
    let mut events = pin!(watcher::watcher(api, config).backoff(backoff));
    let what = K::plural(&());
    while let Some(event) = events.next().await {
        match event {
            // Comes before each try of a list, and so says nothing yet.
            Ok(Event::Init) => listed = Vec::new(),
            Ok(event) => {
                if std::mem::take(&mut silent) {
                    tracing::info!(%what, "the API server tells again");
                }
                match event {
                    Event::Apply(object) => apply(Change::Put(read(object))),
                    Event::Delete(object) => apply(Change::Gone(read(object))),
                    Event::InitApply(object) => listed.push(read(object)),
                    Event::Init | Event::InitDone => apply(Change::All(std::mem::take(&mut listed))),
                }
            }
            Err(error) => {
                let reason = said(&error, &K::group(&()), &what);
                if !std::mem::replace(&mut silent, true) {
                    tracing::warn!(%what, reason, "the API server does not tell; what is known stays");
                }
                apply(if is_not_served(&error) { Change::NotServed(reason) } else { Change::Silent(reason) });
            }
        }
    }
}

impl Told {
    /// Takes in a change.
    pub fn heard<T>(&mut self, change: &Change<T>) {
        self.listed |= matches!(change, Change::All(_));
        self.silent = match change {
            Change::Silent(reason) | Change::NotServed(reason) => Some(reason.clone()),
            Change::Put(_) | Change::Gone(_) | Change::All(_) => None,
        };
    }

    /// Whether all has been listed once.
    ///
    /// # Errors
    /// Why not, `what` being the subject of the sentence.
    pub fn ready(&self, what: &str) -> Result<(), String> {
        match &self.silent {
            _ if self.listed => Ok(()),
            Some(reason) => Err(format!("{what} cannot be listed: {reason}")),
            None => Err(format!("{what} have not been listed yet")),
        }
    }
}

fn is_not_served(error: &watcher::Error) -> bool {
    matches!(error, watcher::Error::InitialListFailed(kube::Error::Api(status)) if status.code == 404)
}

/// What the API server said, and what is missing if it forbids.
fn said(error: &watcher::Error, group: &str, what: &str) -> String {
    use watcher::Error::{InitialListFailed, NoResourceVersion, WatchError, WatchFailed, WatchStartFailed};
    match error {
        InitialListFailed(error) | WatchStartFailed(error) | WatchFailed(error) => {
            let said = super::said(error);
            match error {
                kube::Error::Api(status) if status.is_forbidden() => format!(
                    "{said}; the ClusterRole needs {{apiGroups: [{group:?}], resources: [{what}], verbs: [list, watch]}}"
                ),
                _ => said,
            }
        }
        WatchError(status) => status.message.clone(),
        NoResourceVersion => error.to_string(),
    }
}
