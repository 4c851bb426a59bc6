//! A document under examination: its problems, each with line and field, and lists within their bound.

use serde_saphyr::Spanned;

use super::{
    document::{List, Problem},
    fact::Callers,
};

/// Entries in one list of a policy.
pub const MAX_ENTRIES: usize = 64;

/// One document under examination.
pub(super) struct Check<'a> {
    pub(super) file: &'a str,
    pub(super) default_signer: &'a str,
    pub(super) callers: Callers,
    pub(super) problems: &'a mut Vec<Problem>,
}

impl Check<'_> {
    pub(super) fn problem<T>(&mut self, at: &Spanned<T>, field: &str, message: impl Into<String>) {
        let (file, field) = (self.file.to_owned(), field.to_owned());
        self.problems.push(Problem { file, line: at.referenced.line(), field, message: message.into() });
    }

    pub(super) fn text<T, U>(&mut self, at: &Spanned<T>, field: &str, parsed: Result<U, String>) -> Option<U> {
        parsed.map_err(|message| self.problem(at, field, message)).ok()
    }

    /// Parses each entry; reports what does not parse, and a list over its bound.
    pub(super) fn list<T, U>(
        &mut self,
        list: &List<T>,
        field: &str,
        max: usize,
        mut parse: impl FnMut(&mut Self, &Spanned<T>, &str) -> Option<U>,
    ) -> Vec<U> {
        let Some(list) = list else {
            return Vec::new();
        };
        if let Some(extra) = list.get(max) {
            self.problem(extra, field, format!("{} entries, at most {max} are allowed", list.len()));
            return Vec::new();
        }
        let entries = list.iter().enumerate();
        entries.filter_map(|(i, entry)| parse(self, entry, &format!("{field}[{i}]"))).collect()
    }
}
