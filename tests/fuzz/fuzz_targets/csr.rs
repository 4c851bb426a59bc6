//! A PKCS#10 request is refused or keeps its bytes.
#![no_main]

use csrd::x509::Csr;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(csr) = Csr::parse(bytes) {
        let again = Csr::parse(csr.der()).expect("what was accepted is accepted again");
        assert_eq!(again.names(), csr.names());
    }
});
