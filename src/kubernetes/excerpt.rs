//! What is read of an object that others write: an excerpt, cut out of the API server's answer as its bytes arrive.
//!
//! Invariant: of a list, a watch or a single object no more is held than one excerpt and what is under way on the
//! connection, however large the objects are: etcd takes 1.5 MiB, which JSON makes up to 9. `kinds` says what any part of
//! csrd looks at, and how much of it there may be. An object with more of it is replaced by its name and UID with the
//! annotation [`BEYOND`], so that a watch goes on and the reader knows; see [`is_beyond`]. The answer stays the JSON that it
//! was, less what nobody reads. Not here: kinds that only an operator writes, and answers that are errors.

mod kinds;
mod report;

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body, Frame as HttpFrame};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use tower::Service;

use self::kinds::{
    KINDS,
    Keep::{self, All, Map, Only},
    Kind,
};
pub use self::kinds::{
    MAX_LABELS, MAX_NAMESPACE_BYTES, MAX_NODE_BYTES, MAX_POD_BYTES, MAX_REQUEST_BYTES, MAX_SELECTOR_LABELS,
    MAX_SERVICE_BYTES, MAX_SLICE_BYTES, MAX_TRUST_BUNDLE_BYTES, page,
};
pub use self::report::{SAID_EVERY, report};

/// The annotation of an object that is beyond its bound. Who writes it by hand makes the object count as that.
pub const BEYOND: &str = "csrd.dev/beyond-bound";

/// Containers within each other that are followed; the API has fewer.
const MAX_DEPTH: usize = 32;
/// Bytes of one name in an excerpt's place.
const MAX_IDENTITY_BYTES: usize = 512;
/// Of every object's metadata.
const IDENTITY: [&str; 4] = ["name", "namespace", "uid", "resourceVersion"];
/// Of every object; `code`, `reason` and `message` are of a `Status`, which ends a watch.
const EVERYWHERE: [&str; 5] = ["kind", "apiVersion", "code", "reason", "message"];

/// Whether this is all that is known of its object, because there is more of it than is read.
pub fn is_beyond(metadata: &ObjectMeta) -> bool {
    metadata.annotations.as_ref().is_some_and(|annotations| annotations.contains_key(BEYOND))
}

/// Where the objects are in an answer.
#[derive(Clone, Copy, Debug)]
enum Shape {
    Single,
    List,
    /// One event in each line.
    Watch,
}

/// What a value is in an answer.
#[derive(Clone, Copy, Debug)]
enum Node {
    List,
    Event,
    Items,
    /// Part of an object.
    Part(&'static Keep, Place),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Root,
    Metadata,
    Elsewhere,
}

/// A container whose content is read.
#[derive(Debug)]
struct Frame {
    node: Node,
    array: bool,
    /// Whether a key comes next.
    key_next: bool,
    written: usize,
    is_object: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lexeme {
    Between,
    Key,
    /// A string, kept or not.
    Text(bool),
    /// A number, `true`, `false` or `null`.
    Plain(bool),
}

/// The object under way.
#[derive(Debug)]
struct Object {
    /// Where it begins in what is kept.
    start: usize,
    beyond: Option<String>,
    identity: [Vec<u8>; IDENTITY.len()],
}

/// Reads JSON byte by byte, and keeps what is looked at.
#[derive(Debug)]
struct Excerpt {
    kind: &'static Kind,
    shape: Shape,
    kept: Vec<u8>,
    stack: Vec<Frame>,
    /// Containers open within one that is not read.
    skipped: usize,
    lexeme: Lexeme,
    escaped: bool,
    key: Vec<u8>,
    object: Option<Object>,
    /// Which of [`IDENTITY`] the string under way is.
    capture: Option<usize>,
}

impl Excerpt {
    /// What is read of the answer to a GET, or to a write, of that path and query; `None` for all of it.
    fn of(path: &str, query: Option<&str>) -> Option<Self> {
        let mut segments = path.trim_matches('/').split('/');
        let version = if segments.next()? == "api" { 1 } else { 2 };
        let rest: Vec<_> = segments.skip(version - 1).skip(1).collect();
        let (namespaced, resource, named) = match *rest.as_slice() {
            ["namespaces", _, resource, ref named @ ..] => (true, resource, !named.is_empty()),
            [resource, ref named @ ..] => (false, resource, !named.is_empty()),
            [] => return None,
        };
        let fits = |kind: &&Kind| kind.resource == resource && kind.namespaced.is_none_or(|it| it == namespaced);
        let watches = query.unwrap_or_default().split('&').any(|it| it == "watch=true");
        let shape = match (watches, named) {
            (true, _) => Shape::Watch,
            (false, true) => Shape::Single,
            (false, false) => Shape::List,
        };
        Some(Self::new(KINDS.iter().find(fits)?, shape))
    }

    fn new(kind: &'static Kind, shape: Shape) -> Self {
        Self {
            kind,
            shape,
            kept: Vec::new(),
            stack: Vec::new(),
            skipped: 0,
            lexeme: Lexeme::Between,
            escaped: false,
            key: Vec::new(),
            object: None,
            capture: None,
        }
    }

    fn feed(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            match self.lexeme {
                Lexeme::Between => self.between(byte),
                Lexeme::Key => self.in_key(byte),
                Lexeme::Text(keep) => self.in_text(byte, keep),
                Lexeme::Plain(keep) if !matches!(byte, b',' | b'}' | b']') && !byte.is_ascii_whitespace() => {
                    self.keep_if(keep, byte);
                }
                Lexeme::Plain(_) => {
                    self.lexeme = Lexeme::Between;
                    self.between(byte);
                }
            }
        }
    }

    /// What is kept of all objects that are complete.
    fn take(&mut self) -> Bytes {
        let end = self.object.as_mut().map_or(self.kept.len(), |object| std::mem::take(&mut object.start));
        Bytes::from(self.kept.drain(..end).collect::<Vec<_>>())
    }

    fn between(&mut self, byte: u8) {
        if self.skipped > 0 {
            match byte {
                b'{' | b'[' => self.skipped += 1,
                b'}' | b']' => self.skipped -= 1,
                b'"' => self.lexeme = Lexeme::Text(false),
                _ => {}
            }
            return;
        }
        match byte {
            b'\n' if self.stack.is_empty() => self.kept.push(byte),
            b',' => {
                if let Some(frame) = self.stack.last_mut() {
                    frame.key_next = !frame.array;
                }
            }
            b':' | b' ' | b'\t' | b'\r' | b'\n' => {}
            b'}' | b']' => self.close(byte),
            b'"' if self.stack.last().is_some_and(|frame| frame.key_next) => {
                self.key.clear();
                self.lexeme = Lexeme::Key;
            }
            b'{' | b'[' => match self.value().filter(|_| self.stack.len() < MAX_DEPTH) {
                Some(node) => self.open(node, byte),
                None => self.skipped = 1,
            },
            _ => {
                let keep = self.value().is_some();
                if keep {
                    self.introduce();
                }
                self.keep_if(keep, byte);
                self.lexeme = if byte == b'"' { Lexeme::Text(keep) } else { Lexeme::Plain(keep) };
            }
        }
    }

    fn in_key(&mut self, byte: u8) {
        let escaped = std::mem::take(&mut self.escaped);
        match byte {
            b'"' if !escaped => {
                self.lexeme = Lexeme::Between;
                if let Some(frame) = self.stack.last_mut() {
                    frame.key_next = false;
                }
            }
            _ => {
                self.escaped = byte == b'\\' && !escaped;
                match self.key.len() < self.kind.max {
                    true => self.key.push(byte),
                    false => self.goes_beyond(format!("at most {} bytes of it are read", self.kind.max)),
                }
            }
        }
    }

    fn in_text(&mut self, byte: u8, keep: bool) {
        let escaped = std::mem::take(&mut self.escaped);
        self.keep_if(keep, byte);
        match byte {
            b'"' if !escaped => {
                self.lexeme = Lexeme::Between;
                self.capture = None;
                return;
            }
            _ => self.escaped = byte == b'\\' && !escaped,
        }
        if let (Some(which), Some(object)) = (self.capture, &mut self.object)
            && object.identity[which].len() < MAX_IDENTITY_BYTES
        {
            object.identity[which].push(byte);
        }
    }

    /// What the value that begins is, if it is read.
    fn value(&mut self) -> Option<Node> {
        self.capture = None;
        let Some(frame) = self.stack.last() else {
            return Some(match self.shape {
                Shape::Single => Node::Part(&self.kind.keep, Place::Root),
                Shape::List => Node::List,
                Shape::Watch => Node::Event,
            });
        };
        let key = self.key.as_slice();
        let is_one_of = |keys: &[&str]| keys.iter().any(|it| it.as_bytes() == key);
        const WHOLE: Node = Node::Part(&All, Place::Elsewhere);
        match frame.node {
            Node::List if key == b"items" => Some(Node::Items),
            Node::List => is_one_of(&["metadata", "kind", "apiVersion"]).then_some(WHOLE),
            Node::Event if key == b"object" => Some(Node::Part(&self.kind.keep, Place::Root)),
            Node::Event => is_one_of(&["type"]).then_some(WHOLE),
            Node::Items => Some(Node::Part(&self.kind.keep, Place::Root)),
            Node::Part(..) if frame.array => Some(frame.node),
            Node::Part(_, Place::Root) if is_one_of(&EVERYWHERE) => Some(WHOLE),
            Node::Part(keep, Place::Root) if key == b"metadata" => match keep {
                Only(fields) => {
                    let own = fields.iter().find(|(field, _)| *field == "metadata").map(|(_, keep)| keep);
                    Some(Node::Part(own.unwrap_or(&Only(&[])), Place::Metadata))
                }
                All | Map(_) => Some(Node::Part(keep, Place::Metadata)),
            },
            Node::Part(keep, place) => {
                let identity = IDENTITY.iter().position(|it| it.as_bytes() == key);
                if place == Place::Metadata && identity.is_some() {
                    self.capture = identity;
                    return Some(WHOLE);
                }
                match keep {
                    All => Some(WHOLE),
                    Map(max) if frame.written >= *max => {
                        self.goes_beyond(format!("of its {} at most {max} are read", self.kind.map()));
                        None
                    }
                    Map(_) => Some(WHOLE),
                    Only(fields) => {
                        let field = fields.iter().find(|(field, _)| field.as_bytes() == key);
                        field.map(|(_, keep)| Node::Part(keep, Place::Elsewhere))
                    }
                }
            }
        }
    }

    fn open(&mut self, node: Node, byte: u8) {
        self.introduce();
        let is_object = byte == b'{' && matches!(node, Node::Part(_, Place::Root)) && self.object.is_none();
        if is_object {
            self.object = Some(Object { start: self.kept.len(), beyond: None, identity: Default::default() });
        }
        self.keep(byte);
        self.stack.push(Frame { node, array: byte == b'[', key_next: byte == b'{', written: 0, is_object });
    }

    fn close(&mut self, byte: u8) {
        let Some(frame) = self.stack.pop() else { return };
        self.keep(byte);
        if frame.is_object
            && let Some(Object { beyond: Some(bound), identity, .. }) = self.object.take()
        {
            self.stand_in(&identity, &bound);
        }
    }

    /// Writes what stands before a value in its container.
    fn introduce(&mut self) {
        let Some(frame) = self.stack.last_mut() else { return };
        let (first, array) = (frame.written == 0, frame.array);
        frame.written += 1;
        if !first {
            self.keep(b',');
        }
        if !array {
            let key = std::mem::take(&mut self.key);
            self.keep(b'"');
            key.iter().for_each(|byte| self.keep(*byte));
            self.keep(b'"');
            self.keep(b':');
            self.key = key;
        }
    }

    fn keep_if(&mut self, keep: bool, byte: u8) {
        if keep {
            self.keep(byte);
        }
    }

    fn keep(&mut self, byte: u8) {
        if self.object.as_ref().is_some_and(|object| object.beyond.is_some()) {
            return;
        }
        self.kept.push(byte);
        if self.object.as_ref().is_some_and(|object| self.kept.len() - object.start > self.kind.max) {
            self.goes_beyond(format!("at most {} bytes of it are read", self.kind.max));
        }
    }

    /// Gives up what is kept of the object under way, but for its names.
    fn goes_beyond(&mut self, bound: String) {
        if let Some(object) = &mut self.object
            && object.beyond.is_none()
        {
            object.beyond = Some(bound);
            self.kept.truncate(object.start);
        }
    }

    /// An object in place of one that is beyond its bound.
    fn stand_in(&mut self, identity: &[Vec<u8>; IDENTITY.len()], bound: &str) {
        self.kept.extend_from_slice(b"{\"metadata\":{");
        for (key, value) in IDENTITY.iter().zip(identity).filter(|(_, value)| !value.is_empty()) {
            self.kept.extend_from_slice(format!("\"{key}\":\"").as_bytes());
            self.kept.extend_from_slice(value);
            self.kept.extend_from_slice(b"\",");
        }
        self.kept.extend_from_slice(format!("\"annotations\":{{\"{BEYOND}\":\"{bound}\"}}}}}}").as_bytes());
        let [name, namespace, ..] = identity.each_ref().map(|value| String::from_utf8_lossy(value));
        report(self.kind.resource, &namespace, &name, bound);
    }
}

/// A client whose answers are excerpts, where [`KINDS`] has the kind.
#[derive(Clone, Debug)]
pub(super) struct Excerpts<S>(pub(super) S);

impl<S, A, B> Service<Request<A>> for Excerpts<S>
where
    S: Service<Request<A>, Response = Response<B>>,
    S::Future: Send + 'static,
{
    type Response = Response<ExcerptBody<B>>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request<A>) -> Self::Future {
        let excerpt = Excerpt::of(request.uri().path(), request.uri().query());
        // What is made is answered by itself alone.
        let creates = request.method() == http::Method::POST;
        let excerpt = excerpt.map(|it| if creates { Excerpt::new(it.kind, Shape::Single) } else { it });
        let answer = self.0.call(request);
        Box::pin(async move {
            let answer = answer.await?;
            let excerpt = excerpt.filter(|_| answer.status().is_success());
            Ok(answer.map(|body| ExcerptBody { body, excerpt }))
        })
    }
}

/// What is read of a body.
#[derive(Debug)]
pub(super) struct ExcerptBody<B> {
    body: B,
    /// Of all of it if there is none.
    excerpt: Option<Excerpt>,
}

impl<B: Body<Data = Bytes> + Unpin> Body for ExcerptBody<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<HttpFrame<Bytes>, B::Error>>> {
        loop {
            let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
            let Some(excerpt) = &mut self.excerpt else { return Poll::Ready(frame) };
            let kept = match frame {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => {
                        excerpt.feed(&data);
                        excerpt.take()
                    }
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                },
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                // An object that has not ended is handed on as it is, to be refused by who reads it.
                None => match std::mem::take(&mut excerpt.kept) {
                    rest if rest.is_empty() => return Poll::Ready(None),
                    rest => Bytes::from(rest),
                },
            };
            if !kept.is_empty() {
                return Poll::Ready(Some(Ok(HttpFrame::data(kept))));
            }
        }
    }
}

/// What is read of an object at that path, for tests of what reads it.
#[cfg(test)]
pub(crate) fn excerpt(path: &str, object: &serde_json::Value) -> serde_json::Value {
    let mut excerpt = Excerpt::of(path, None).expect("the kind is one of KINDS");
    excerpt.feed(object.to_string().as_bytes());
    serde_json::from_slice(&excerpt.take()).expect("an excerpt is JSON")
}

#[cfg(test)]
mod tests;
