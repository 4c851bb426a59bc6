//! The signer that asks the API server: a real one, with its own signer or one of the test's, and behind a proxy that fails
//! as a test says.

#![allow(clippy::disallowed_methods, reason = "real servers, whose time is the real one")]

mod approval;
mod authority;
mod cleaning;
mod failures;
mod rig;
mod signing;
