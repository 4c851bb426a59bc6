//! A policy document is refused, with a place for every problem, or compiled.
#![no_main]

use csrd::policy::{EMBEDDED, PolicySet, Source};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: String| {
    let sources = [Source { origin: "fuzz.yaml".to_owned(), text }];
    if let Err(problems) = PolicySet::parse(&sources, EMBEDDED) {
        assert!(!problems.is_empty() && problems.iter().all(|problem| problem.file == "fuzz.yaml"));
    }
});
