//! ServiceAccount tokens: the API server says whose one is.
//!
//! A token counts when the API server accepts it for our own audience (so that it is worth nothing there, and one made
//! for the API server is worth nothing here), when it is bound to a pod, and when that pod is on this node. It is never
//! logged, shown or kept: verdicts are kept by its hash, for [`VERDICT_HOLDS_FOR`], because a token ends with its pod.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, UserInfo};
use kube::{Api, Client, api::PostParams};
use tokio::{
    sync::{OnceCell, Semaphore},
    time::{Instant, timeout},
};
use zeroize::Zeroizing;

use super::shares::Shares;
use crate::kubernetes::{self, extra};

/// How long a verdict is used again.
pub const VERDICT_HOLDS_FOR: Duration = Duration::from_secs(10);
/// Verdicts kept; the oldest makes room.
pub const MAX_VERDICTS: usize = 1024;
/// Reviews under way at once; more wait.
pub const MAX_REVIEWS: usize = 8;
/// Of these, reviews of tokens that one pod sent; more wait.
pub const MAX_REVIEWS_PER_POD: usize = 2;
/// How long a review may take, waiting for its turn included.
pub const REVIEW_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes of a token.
pub const MAX_TOKEN_BYTES: usize = 8 * 1024;

/// The group of all ServiceAccounts, and of nobody else.
const SERVICE_ACCOUNTS: &str = "system:serviceaccounts";

/// A token as it was sent.
#[derive(Clone)]
pub struct Token(Zeroizing<String>);

/// Reviews tokens.
pub struct Tokens {
    client: Client,
    audience: String,
    node: String,
    verdicts: Mutex<HashMap<[u8; 32], Review>>,
    under_way: Semaphore,
    shares: Shares,
}

/// One review, of which the outcome is shared by all who ask meanwhile.
#[derive(Clone)]
struct Review {
    begun: Instant,
    verdict: Arc<OnceCell<Result<Bearer, TokenError>>>,
}

/// Whose a token is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Bearer {
    pub(super) pod_uid: String,
}

/// Why a token does not count.
#[derive(Clone, Debug, thiserror::Error)]
pub enum TokenError {
    /// The header is no bearer token.
    #[error("authorization: one header \"Bearer TOKEN\" is expected, with a token of at most {MAX_TOKEN_BYTES} bytes")]
    Malformed,
    /// The API server does not know it.
    #[error("the API server does not accept the token for audience {audience:?}: {why}")]
    NotAccepted {
        /// Ours.
        audience: String,
        /// The API server's words.
        why: String,
    },
    /// It is nobody's, or anybody's.
    #[error("the token is not bound to a pod; mount a projected ServiceAccount token")]
    NotBound,
    /// It is bound to a pod of another node.
    #[error("the token is bound to a pod of another node")]
    OtherNode,
    /// The kernel says that the caller is in another pod.
    #[error("the token is of another pod than the calling process, which the kernel tells by its cgroup")]
    OtherPod,
    /// The kernel says that the caller is in no pod.
    #[error("the token is of a pod and the calling process is in none; leave out the authorization header")]
    NotInPod,
    /// The API server did not answer.
    #[error("the API server does not review the token: {why}")]
    NotReviewed {
        /// Why not.
        why: String,
    },
}

impl Token {
    /// The token in the values of the authorization headers of one call, if there are any.
    ///
    /// # Errors
    /// [`TokenError::Malformed`].
    pub fn in_headers<'a>(mut values: impl Iterator<Item = &'a [u8]>) -> Result<Option<Self>, TokenError> {
        let Some(value) = values.next() else { return Ok(None) };
        let (scheme, token) = value.split_at_checked("Bearer ".len()).ok_or(TokenError::Malformed)?;
        let allowed = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~+/=".contains(byte);
        let well_formed = scheme.eq_ignore_ascii_case(b"Bearer ")
            && (1..=MAX_TOKEN_BYTES).contains(&token.len())
            && token.iter().all(allowed)
            && values.next().is_none();
        if !well_formed {
            return Err(TokenError::Malformed);
        }
        let token = str::from_utf8(token).map_err(|_| TokenError::Malformed)?;
        Ok(Some(Self(Zeroizing::new(token.to_owned()))))
    }

    fn sha256(&self) -> [u8; 32] {
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, self.0.as_bytes());
        digest.as_ref().try_into().expect("SHA-256 has 32 bytes")
    }
}

impl Tokens {
    /// Reviews tokens for `audience`, of pods of `node`.
    pub fn new(client: Client, audience: String, node: String) -> Self {
        let (under_way, shares) = (Semaphore::new(MAX_REVIEWS), Shares::new(MAX_REVIEWS_PER_POD));
        Self { client, audience, node, verdicts: Mutex::default(), under_way, shares }
    }

    /// Whose `token` is that the pod with UID `sender` sent, by a verdict of at most [`VERDICT_HOLDS_FOR`] ago.
    pub(super) async fn review(&self, sender: &str, token: &Token) -> Result<Bearer, TokenError> {
        let key = token.sha256();
        let Review { verdict, .. } = self.begun(key);
        let outcome = verdict.get_or_init(|| self.ask(sender, token)).await.clone();
        if outcome.as_ref().is_err_and(TokenError::is_transient) {
            self.lock().retain(|_, review| !Arc::ptr_eq(&review.verdict, &verdict));
        }
        outcome
    }

    /// The review of that token that is at hand, or a new one.
    fn begun(&self, key: [u8; 32]) -> Review {
        let mut verdicts = self.lock();
        if let Some(review) = verdicts.get(&key).filter(|review| review.begun.elapsed() < VERDICT_HOLDS_FOR) {
            return review.clone();
        }
        if verdicts.len() >= MAX_VERDICTS {
            verdicts.retain(|_, review| review.begun.elapsed() < VERDICT_HOLDS_FOR);
        }
        if verdicts.len() >= MAX_VERDICTS
            && let Some(oldest) = verdicts.iter().min_by_key(|(_, review)| review.begun).map(|(key, _)| *key)
        {
            verdicts.remove(&oldest);
        }
        let review = Review { begun: Instant::now(), verdict: Arc::default() };
        verdicts.insert(key, review.clone());
        review
    }

    async fn ask(&self, sender: &str, token: &Token) -> Result<Bearer, TokenError> {
        let not_reviewed = |why: String| TokenError::NotReviewed { why };
        let review = TokenReview {
            spec: TokenReviewSpec { audiences: Some(vec![self.audience.clone()]), token: token.0.as_str().to_owned() },
            ..TokenReview::default()
        };
        let reviews = Api::<TokenReview>::all(self.client.clone());
        let share = self.shares.of(sender);
        let answer = async {
            let _own = share.acquire().await.expect("it is never closed");
            let _turn = self.under_way.acquire().await.expect("it is never closed");
            reviews.create(&PostParams::default(), &review).await
        };
        let answered = timeout(REVIEW_TIMEOUT, answer).await;
        let answered =
            answered.map_err(|_| not_reviewed(format!("no answer within {} s", REVIEW_TIMEOUT.as_secs())))?;
        let status = answered.map_err(|error| not_reviewed(kubernetes::said(&error)))?.status.unwrap_or_default();
        let not_accepted = |why: String| TokenError::NotAccepted { audience: self.audience.clone(), why };
        if status.authenticated != Some(true) {
            return Err(not_accepted(status.error.unwrap_or_else(|| "it gives no reason".to_owned())));
        }
        if !status.audiences.unwrap_or_default().contains(&self.audience) {
            return Err(not_accepted("it does not say that the token is for this audience".to_owned()));
        }
        self.bearer(status.user.unwrap_or_default())
    }

    fn bearer(&self, user: UserInfo) -> Result<Bearer, TokenError> {
        let of_service_account = user.groups.unwrap_or_default().iter().any(|group| group == SERVICE_ACCOUNTS);
        let one = |key| extra::one(user.extra.as_ref(), key);
        let (Some(pod_uid), true) = (one(extra::POD_UID), of_service_account) else { return Err(TokenError::NotBound) };
        if one(extra::NODE_NAME) == Some(&self.node) {
            Ok(Bearer { pod_uid: pod_uid.clone() })
        } else {
            Err(TokenError::OtherNode)
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<[u8; 32], Review>> {
        self.verdicts.lock().expect("no code panics while it holds the verdicts")
    }
}

impl TokenError {
    /// A stable name for metrics and for `google.rpc.ErrorInfo`.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Malformed => "TOKEN_MALFORMED",
            Self::NotAccepted { .. } => "TOKEN_NOT_ACCEPTED",
            Self::NotBound => "TOKEN_NOT_BOUND",
            Self::OtherNode => "TOKEN_OF_OTHER_NODE",
            Self::OtherPod => "TOKEN_OF_OTHER_POD",
            Self::NotInPod => "TOKEN_OUTSIDE_POD",
            Self::NotReviewed { .. } => "TOKEN_NOT_REVIEWED",
        }
    }

    /// Whether the same call may succeed later.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::NotReviewed { .. })
    }
}

/// Without the token.
impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokens").field("audience", &self.audience).field("node", &self.node).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        convert::Infallible,
        sync::atomic::{AtomicUsize, Ordering},
    };

    use kube::client::Body;
    use serde_json::{Value, json};
    use tokio::time::{advance, sleep};

    use super::*;

    /// How long the API server takes.
    const ANSWER_TAKES: Duration = Duration::from_millis(100);

    /// Tokens of an API server that answers so, and how often it was asked.
    fn tokens(code: u16, answer: Value) -> (Arc<Tokens>, Arc<AtomicUsize>) {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = asked.clone();
        let answer = answer.to_string().into_bytes();
        let service = tower::service_fn(move |_: http::Request<Body>| {
            count.fetch_add(1, Ordering::Relaxed);
            let answer = http::Response::builder().status(code).body(Body::from(answer.clone())).unwrap();
            async {
                sleep(ANSWER_TAKES).await;
                Ok::<_, Infallible>(answer)
            }
        });
        (Arc::new(Tokens::new(Client::new(service, "default"), "csrd".to_owned(), "n1".to_owned())), asked)
    }

    /// A review of a good token, with `more` as its user's extra.
    fn good(extra: Value) -> Value {
        let user = json!({"username": "system:serviceaccount:shop:web", "groups": [SERVICE_ACCOUNTS], "extra": extra});
        json!({"spec": {"token": ""}, "status": {"authenticated": true, "audiences": ["csrd"], "user": user}})
    }

    fn bound() -> Value {
        json!({extra::NODE_NAME: ["n1"], extra::POD_UID: ["u1"], extra::POD_NAME: ["web"]})
    }

    fn token(text: &str) -> Token {
        Token::in_headers([format!("Bearer {text}").as_bytes()].into_iter()).unwrap().unwrap()
    }

    #[test]
    fn one_bearer_token_of_bounded_length_is_read() {
        let read = |values: &[&str]| Token::in_headers(values.iter().map(|value| value.as_bytes()));
        assert!(read(&[]).unwrap().is_none());
        let longest = "a".repeat(MAX_TOKEN_BYTES);
        for value in ["Bearer a.b-c_d", "bearer a", &format!("Bearer {longest}")] {
            assert!(read(&[value]).unwrap().is_some(), "{value}");
        }
        let too_long = format!("Bearer {longest}a");
        for values in [
            &["Bearer a", "Bearer a"][..],
            &["Bearer "],
            &["Bearer"],
            &[""],
            &["Basic a"],
            &["Bearer a b"],
            &["Bearer a,b"],
            &["Bearer ä"],
            &[&too_long],
        ] {
            assert_eq!(read(values).unwrap_err().reason(), "TOKEN_MALFORMED", "{values:?}");
        }
        assert_eq!(format!("{:?}", token("secret")), "Token(..)");
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_is_its_pods_if_it_is_for_us_bound_and_of_this_node() {
        let (reviewer, _) = tokens(201, good(bound()));
        assert_eq!(reviewer.review("u1", &token("a")).await.unwrap(), Bearer { pod_uid: "u1".to_owned() });
        let status = |status: Value| json!({"spec": {"token": ""}, "status": status});
        let with = |key: &str, value: Value| {
            let mut review = good(bound());
            review["status"]["user"]["extra"][key] = value;
            review
        };
        let (mut person, mut other_audience) = (good(bound()), good(bound()));
        person["status"]["user"]["groups"] = json!(["system:authenticated"]);
        other_audience["status"]["audiences"] = json!(["https://kubernetes.default.svc"]);
        for (answer, reason) in [
            (status(json!({"error": "token has expired"})), "TOKEN_NOT_ACCEPTED"),
            (status(json!({"authenticated": false})), "TOKEN_NOT_ACCEPTED"),
            (status(json!({"authenticated": true})), "TOKEN_NOT_ACCEPTED"),
            (other_audience, "TOKEN_NOT_ACCEPTED"),
            (person, "TOKEN_NOT_BOUND"),
            (good(json!({})), "TOKEN_NOT_BOUND"),
            (with(extra::POD_UID, json!(["u1", "u2"])), "TOKEN_NOT_BOUND"),
            (with(extra::NODE_NAME, json!(["n2"])), "TOKEN_OF_OTHER_NODE"),
            (with(extra::NODE_NAME, json!(["n1", "n2"])), "TOKEN_OF_OTHER_NODE"),
            (with(extra::NODE_NAME, json!([])), "TOKEN_OF_OTHER_NODE"),
        ] {
            let (reviewer, asked) = tokens(201, answer.clone());
            for _ in 0..2 {
                let error = reviewer.review("u1", &token("a")).await.unwrap_err();
                assert_eq!((error.reason(), error.is_transient()), (reason, false), "{answer}");
            }
            assert_eq!(asked.load(Ordering::Relaxed), 1, "a refusal holds as a yes does");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_verdict_is_shared_and_holds_for_ten_seconds() {
        let (reviewer, asked) = tokens(201, good(bound()));
        let (a, b) = (token("a"), token("b"));
        let (first, second, other) =
            tokio::join!(reviewer.review("u1", &a), reviewer.review("u1", &a), reviewer.review("u1", &b));
        assert!(first.is_ok() && second.is_ok() && other.is_ok());
        assert_eq!(asked.load(Ordering::Relaxed), 2, "once for each token");
        advance(VERDICT_HOLDS_FOR - ANSWER_TAKES - Duration::from_millis(1)).await;
        reviewer.review("u1", &a).await.unwrap();
        assert_eq!(asked.load(Ordering::Relaxed), 2);
        advance(Duration::from_millis(1)).await;
        reviewer.review("u1", &a).await.unwrap();
        assert_eq!(asked.load(Ordering::Relaxed), 3, "counted from when the API server was asked");
    }

    #[tokio::test(start_paused = true)]
    async fn an_api_server_that_does_not_review_is_asked_again() {
        let message = json!({"kind": "Status", "status": "Failure", "code": 503, "message": "away", "reason": "x"});
        let (reviewer, asked) = tokens(503, message);
        let a = token("a");
        let both = tokio::join!(reviewer.review("u1", &a), reviewer.review("u1", &a));
        for error in [both.0.unwrap_err(), both.1.unwrap_err(), reviewer.review("u1", &a).await.unwrap_err()] {
            assert_eq!(error.to_string(), "the API server does not review the token: away");
            assert!(error.is_transient());
        }
        assert_eq!(asked.load(Ordering::Relaxed), 2, "those who ask at once share the answer");
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_with_many_tokens_delays_no_other_pods() {
        let (reviewer, asked) = tokens(201, good(bound()));
        let many = (0..10 * MAX_REVIEWS).map(|n| {
            let reviewer = reviewer.clone();
            tokio::spawn(async move { reviewer.review("greedy", &token(&n.to_string())).await })
        });
        let many: Vec<_> = many.collect();
        sleep(ANSWER_TAKES / 2).await;
        assert_eq!(asked.load(Ordering::Relaxed), MAX_REVIEWS_PER_POD, "its share, and not one more");
        let began = Instant::now();
        reviewer.review("u1", &token("a")).await.unwrap();
        assert_eq!(began.elapsed(), ANSWER_TAKES, "no wait");
        for review in many {
            review.await.unwrap().unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn verdicts_and_reviews_are_bounded() {
        let (reviewer, asked) = tokens(201, good(bound()));
        let all = MAX_REVIEWS * (REVIEW_TIMEOUT.as_millis() / ANSWER_TAKES.as_millis()) as usize;
        let began = Instant::now();
        let reviews = (0..=2 * all).map(|n| {
            let reviewer = reviewer.clone();
            tokio::spawn(async move { reviewer.review(&format!("u{}", n % 4), &token(&n.to_string())).await })
        });
        let mut late = 0;
        for review in reviews.collect::<Vec<_>>() {
            late += usize::from(review.await.unwrap().is_err());
        }
        assert_eq!(began.elapsed(), REVIEW_TIMEOUT, "nobody waits longer");
        assert!((all..=all + 2 * MAX_REVIEWS).contains(&late), "{late} did not get their turn in time");
        for n in 0..=MAX_VERDICTS {
            let _ = reviewer.begun(token(&format!("x{n}")).sha256());
        }
        assert_eq!(reviewer.lock().len(), MAX_VERDICTS);
        assert!(asked.load(Ordering::Relaxed) <= all + MAX_REVIEWS);
    }
}
