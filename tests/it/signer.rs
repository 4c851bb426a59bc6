//! The signer that asks the API server: a real one, with its own signer or one of the test's, and behind a proxy that fails
//! as a test says.

mod approval;
mod authority;
mod cleaning;
mod failures;
mod rig;
mod signing;
pub(crate) fn rig_grant() -> csrd::policy::Grant {
    rig::grant(rig::client_auth(), 3600)
}
