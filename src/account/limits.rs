//! The bounds: constants for one principal, and totals that follow from memory and descriptors.

use super::Kind;

/// Descriptors that a connection takes: the socket, the process, and its folder under `/proc`.
const DESCRIPTORS_PER_CONNECTION: usize = 3;
/// Descriptors that are kept for files, among them those by which callers are attested and policies read.
const RESERVED_DESCRIPTORS: usize = 512;
/// Connections of all principals, however many descriptors there are.
const MAX_CONNECTIONS: usize = 32_768;
/// Calls of one principal under way, open streams among them.
const MAX_CALLS_PER_PRINCIPAL: usize = 4096;
/// Requests of one principal that are arriving; their bytes are counted besides.
const MAX_ARRIVING_PER_PRINCIPAL: usize = 256;
/// Entries of one principal.
const MAX_ENTRIES_PER_PRINCIPAL: usize = 2048;
/// Entries of all principals, however much memory there is.
const MAX_ENTRIES: usize = 32_768;
/// Connections with a call, or entries, that are few for one principal.
const FEW: usize = 4;
/// Refusals of one principal at once, before its calls have to wait.
const REFUSALS_BURST: u32 = 400;

/// Bytes of memory that an agent needs for itself: its program, policies, the objects of a cluster that it follows, and
/// what an issuance takes.
pub const OWN_BYTES: usize = 48 << 20;
/// Bytes of memory that are counted for a connection without a call: a process, a socket, and the HTTP/2 stack's buffers.
pub const CONNECTION_BYTES: usize = 32 << 10;
/// Bytes of memory that are counted for a call: its stream, its answer's state and what is not sent yet.
pub const CALL_BYTES: usize = 8 << 10;
/// Bytes of memory that are counted for an entry of the hub: key, certificate, grant and request.
pub const ENTRY_BYTES: usize = 8 << 10;

/// Bounds for one principal and for all together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections of all principals.
    pub connections: usize,
    /// Connections of one principal.
    pub connections_per_principal: usize,
    /// Bytes held for connections and calls of all principals.
    pub bytes: usize,
    /// Bytes held for connections and calls of one principal.
    pub bytes_per_principal: usize,
    /// Calls of one principal under way: open streams, and short calls until they are answered.
    pub streams_per_principal: usize,
    /// Requests of one principal whose message is not there yet.
    pub arriving_per_principal: usize,
    /// Entries of the hub of all principals.
    pub entries: usize,
    /// Entries of the hub of one principal.
    pub entries_per_principal: usize,
    /// Refused calls of one principal before the next have to wait.
    pub refusals_burst: u32,
}

/// How much there is of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bound {
    pub(super) total: usize,
    pub(super) each: usize,
    /// What is few to hold.
    pub(super) few: usize,
}

impl Limits {
    /// The part of every total that root and the agent's own user have besides: a sixteenth.
    pub const RESERVE: usize = 16;
    /// The part of every total that one principal may hold: a quarter.
    pub const SHARE: usize = 4;

    /// The bounds of an agent that may use `memory` bytes and have `descriptors` open.
    ///
    /// Of the memory beyond [`OWN_BYTES`] a half is for connections and calls, a quarter for entries, and a quarter stays
    /// free for what allocators waste. Connections leave room for the descriptors that serve them.
    pub fn of(memory: usize, descriptors: usize) -> Self {
        let shared = memory.saturating_sub(OWN_BYTES).max(memory / 8);
        let bytes = (shared / 2).max(4 * (CONNECTION_BYTES + CALL_BYTES));
        let by_descriptors = descriptors.saturating_sub(RESERVED_DESCRIPTORS) / DESCRIPTORS_PER_CONNECTION;
        let connections = by_descriptors.min(bytes / CONNECTION_BYTES).clamp(1, MAX_CONNECTIONS);
        let entries = (shared / 4 / ENTRY_BYTES).clamp(1, MAX_ENTRIES);
        Self {
            connections,
            connections_per_principal: share(connections),
            bytes,
            bytes_per_principal: share(bytes),
            streams_per_principal: MAX_CALLS_PER_PRINCIPAL.min(share(bytes) / CALL_BYTES),
            arriving_per_principal: MAX_ARRIVING_PER_PRINCIPAL,
            entries,
            entries_per_principal: MAX_ENTRIES_PER_PRINCIPAL.min(share(entries)),
            refusals_burst: REFUSALS_BURST,
        }
    }

    /// What operators have of a kind besides its `total`.
    pub(super) fn reserve(total: usize) -> usize {
        if total == usize::MAX { 0 } else { total.div_ceil(Self::RESERVE) }
    }

    pub(super) fn bound(&self, kind: Kind) -> Bound {
        let (total, each) = match kind {
            Kind::Connections => (self.connections, self.connections_per_principal),
            Kind::Bytes => (self.bytes, self.bytes_per_principal),
            // Their bytes are bounded for all together.
            Kind::Calls => (usize::MAX, self.streams_per_principal),
            Kind::Arriving => (usize::MAX, self.arriving_per_principal),
            Kind::Entries => (self.entries, self.entries_per_principal),
        };
        let few = if kind == Kind::Bytes { FEW * (CONNECTION_BYTES + CALL_BYTES) } else { FEW };
        Bound { total, each, few }
    }
}

/// The bounds where there is a gibibyte of memory and 65536 descriptors may be open, as the systemd unit allows.
impl Default for Limits {
    fn default() -> Self {
        Self::of(1 << 30, 65_536)
    }
}

/// One principal's share of a total.
fn share(total: usize) -> usize {
    total.div_ceil(Limits::SHARE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_room_for_the_files_that_serve_them() {
        for (descriptors, connections) in [(0, 1), (512, 1), (1024, 170), (20_000, 6496), (1 << 20, MAX_CONNECTIONS)] {
            let limits = Limits::of(16 << 30, descriptors);
            assert_eq!(limits.connections, connections, "{descriptors}");
            assert!(limits.connections_per_principal >= connections / 4 && limits.connections_per_principal > 0);
        }
    }

    #[test]
    fn everything_that_may_be_held_fits_into_the_memory_at_once() {
        for mebibytes in [64, 128, 256, 512, 1024, 16 * 1024] {
            let memory = mebibytes << 20;
            let limits = Limits::of(memory, 1 << 20);
            let operators = Limits::reserve(limits.bytes) + Limits::reserve(limits.entries) * ENTRY_BYTES;
            let held = OWN_BYTES.min(memory * 7 / 8) + limits.bytes + limits.entries * ENTRY_BYTES + operators;
            assert!(held <= memory, "{mebibytes} MiB: {held}");
        }
    }

    #[test]
    fn the_shipped_limit_has_room_for_a_full_node_of_pods_with_streams() {
        let limits = Limits::of(128 << 20, 1 << 20);
        assert!(limits.bytes / (CONNECTION_BYTES + CALL_BYTES) > 1000, "{limits:?}");
        assert!(limits.connections > 1000 && limits.entries > 2000, "{limits:?}");
    }

    #[test]
    fn however_little_memory_there_is_somebody_is_served() {
        let limits = Limits::of(0, 0);
        assert!(limits.connections > 0 && limits.entries > 0 && limits.streams_per_principal > 0, "{limits:?}");
        assert!(limits.bytes_per_principal >= CONNECTION_BYTES + CALL_BYTES);
    }
}
