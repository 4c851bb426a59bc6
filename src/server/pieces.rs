//! Where in a stream of pieces a reader is: each piece is a head of fixed size, which says how many bytes follow.
//!
//! HTTP/2 frames and gRPC messages are such pieces. This counts what has come of one that is not complete, copies nothing
//! but heads, and judges nothing.

/// A position among pieces with heads of `HEAD` bytes.
#[derive(Debug)]
pub(super) struct Pieces<const HEAD: usize> {
    head: [u8; HEAD],
    filled: usize,
    /// Bytes that are still to come before the next head.
    rest: usize,
    /// A piece that is continued by the next one, as a header block is.
    continues: bool,
    /// Bytes of what is not complete.
    begun: usize,
}

/// What a head says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Head {
    /// Bytes after the head.
    pub(super) rest: usize,
    /// Whether the next piece belongs to this one.
    pub(super) continues: bool,
}

impl<const HEAD: usize> Pieces<HEAD> {
    /// Before the first piece, which so many bytes precede.
    pub(super) fn after(preface: usize) -> Self {
        Self { head: [0; HEAD], filled: 0, rest: preface, continues: false, begun: 0 }
    }

    /// Bytes of what is not complete.
    pub(super) fn begun(&self) -> usize {
        self.begun
    }

    /// Takes in what has come; `read` says what a head means, given whether its piece continues one. True if something
    /// was completed.
    pub(super) fn pass(&mut self, mut bytes: &[u8], read: impl Fn(&[u8; HEAD], bool) -> Head) -> bool {
        let mut completed = false;
        while !bytes.is_empty() {
            let taken = if self.rest > 0 {
                let taken = self.rest.min(bytes.len());
                self.rest -= taken;
                taken
            } else {
                let taken = (HEAD - self.filled).min(bytes.len());
                self.head[self.filled..self.filled + taken].copy_from_slice(&bytes[..taken]);
                self.filled += taken;
                if self.filled == HEAD {
                    let head = read(&self.head, self.continues);
                    (self.filled, self.rest, self.continues) = (0, head.rest, head.continues);
                }
                taken
            };
            self.begun += taken;
            bytes = &bytes[taken..];
            if self.rest == 0 && self.filled == 0 && !self.continues {
                (self.begun, completed) = (0, true);
            }
        }
        completed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A head of two bytes: whether it continues, and a length.
    fn read(head: &[u8; 2], _: bool) -> Head {
        Head { rest: head[1].into(), continues: head[0] == 1 }
    }

    #[test]
    fn what_is_begun_ends_with_its_last_byte_however_it_is_cut() {
        let bytes = [0, 0, 0, 2, 7, 7, 1, 1, 7, 1, 0, 0, 1, 7];
        let mut pieces = Pieces::<2>::after(0);
        let begun: Vec<_> = bytes
            .iter()
            .map(|byte| {
                assert_eq!(pieces.pass(&[*byte], read), pieces.begun() == 0);
                pieces.begun()
            })
            .collect();
        assert_eq!(begun, [1, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 0]);
        for cut in 0..=bytes.len() {
            let mut pieces = Pieces::<2>::after(0);
            pieces.pass(&bytes[..cut], read);
            pieces.pass(&bytes[cut..], read);
            assert_eq!(pieces.begun(), 0, "{cut}");
        }
    }
}
