//! Places that pods share: one pod holds its share at most, however much it asks for, so that the others find some.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use tokio::sync::Semaphore;

/// The share of each pod, by its UID; remembered while something of it is held or waited for.
#[derive(Debug)]
pub(super) struct Shares {
    places: usize,
    shares: Mutex<HashMap<String, Arc<Semaphore>>>,
}

impl Shares {
    /// Of so many places each.
    pub(super) fn new(places: usize) -> Self {
        Self { places, shares: Mutex::default() }
    }

    /// The places of one pod, to be kept as long as one of them is.
    pub(super) fn of(&self, pod: &str) -> Arc<Semaphore> {
        let mut shares = self.shares.lock().expect("no code panics while it holds the shares");
        if let Some(share) = shares.get(pod) {
            return share.clone();
        }
        shares.retain(|_, share| Arc::strong_count(share) > 1);
        let share = Arc::new(Semaphore::new(self.places));
        shares.insert(pod.to_owned(), share.clone());
        share
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_remembered_while_it_is_held_and_no_longer() {
        let shares = Shares::new(1);
        let held = shares.of("u1");
        let place = held.try_acquire().unwrap();
        drop(shares.of("u2"));
        assert!(shares.of("u1").try_acquire().is_err(), "one past the bound");
        assert!(shares.of("u3").try_acquire().is_ok());
        assert_eq!(shares.shares.lock().unwrap().len(), 2, "u2 is forgotten");
        drop(place);
        assert!(shares.of("u1").try_acquire().is_ok());
    }
}
