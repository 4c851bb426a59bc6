//! stub
/// A parsed PKCS#10 request.
#[derive(Debug)]
pub struct Csr(());
