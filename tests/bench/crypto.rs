//! What the mathematics alone cost: one P-256 key and one signature.

use std::time::{Duration, Instant};

use aws_lc_rs::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair},
};

/// Key generations with one signature each, a second, on one core.
pub(crate) fn keygen_and_sign_per_second() -> f64 {
    const MEASURED: Duration = Duration::from_secs(1);
    let random = SystemRandom::new();
    let ca = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).expect("a key");
    let began = Instant::now();
    let mut count = 0;
    while began.elapsed() < MEASURED {
        let key = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).expect("a key");
        std::hint::black_box(&key);
        std::hint::black_box(ca.sign(&random, &[7; 400]).expect("a signature"));
        count += 1;
    }
    f64::from(count) / began.elapsed().as_secs_f64()
}
