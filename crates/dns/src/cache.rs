//! Answers of others, kept for as long as they allow. Pure: it is told what time it is.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use hickory_proto::{
    op::{Message, ResponseCode},
    rr::{RData, Record, RecordType},
};
use tokio::time::Instant;

use crate::message::Response;

/// No answer is kept longer, whatever it says: what moves is found again soon.
const LONGEST: u32 = 300;
/// The same for answers that there is nothing.
const LONGEST_NOTHING: u32 = 30;
/// So long after its time an answer is still better than none.
const STALE: Duration = Duration::from_secs(3600);
/// For how long clients may keep one that was kept too long.
const STALE_TTL: u32 = 5;

/// What an answer depends on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// The name in small letters.
    pub name: hickory_proto::rr::Name,
    /// The type.
    pub asked: RecordType,
    /// Whether signatures were asked for.
    pub dnssec: bool,
    /// Whether they were not to be checked.
    pub unchecked: bool,
}

/// An answer that is kept.
#[derive(Debug)]
struct Kept {
    response: Arc<Response>,
    since: Instant,
    /// How long it holds.
    ttl: u32,
    bytes: usize,
    /// Which of the entries in the queue is this one's.
    turn: u64,
}

/// How good an answer from the cache is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Age {
    /// It holds.
    Fresh,
    /// Its time is over.
    Stale,
}

/// The cache. The oldest answers make room for new ones.
#[derive(Debug)]
pub struct Cache {
    kept: HashMap<Key, Kept>,
    queue: VecDeque<(u64, Key)>,
    bytes: usize,
    most: usize,
    turn: u64,
}

/// What an answer takes beside its own bytes, roughly.
const EACH: usize = 512;

impl Cache {
    /// One that takes about so many bytes.
    pub fn new(most: usize) -> Cache {
        Cache { kept: HashMap::new(), queue: VecDeque::new(), bytes: 0, most, turn: 0 }
    }

    /// How many answers it has.
    pub fn len(&self) -> usize {
        self.kept.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// Forgets everything: others are asked from now on.
    pub fn clear(&mut self) {
        *self = Cache::new(self.most);
    }

    /// An answer with what is left of its time.
    pub fn get(&self, key: &Key, now: Instant) -> Option<(Response, Age)> {
        let kept = self.kept.get(key)?;
        let age = now.saturating_duration_since(kept.since);
        let seconds = u32::try_from(age.as_secs()).unwrap_or(u32::MAX);
        if seconds < kept.ttl {
            let mut response = Response::clone(&kept.response);
            let left = kept.ttl - seconds;
            each(&mut response, |record| record.ttl = record.ttl.saturating_sub(seconds).min(left));
            return Some((response, Age::Fresh));
        }
        if age > STALE + Duration::from_secs(kept.ttl.into()) {
            return None;
        }
        let mut response = Response::clone(&kept.response);
        each(&mut response, |record| record.ttl = STALE_TTL);
        Some((response, Age::Stale))
    }

    /// Keeps an answer whose message had so many bytes, if it may be kept.
    pub fn put(&mut self, key: Key, response: &Arc<Response>, bytes: usize, now: Instant) {
        let Some(ttl) = lifetime(response) else { return };
        let bytes = bytes + EACH;
        self.turn += 1;
        let kept = Kept { response: response.clone(), since: now, ttl, bytes, turn: self.turn };
        self.queue.push_back((self.turn, key.clone()));
        self.bytes += bytes;
        if let Some(old) = self.kept.insert(key, kept) {
            self.bytes -= old.bytes;
        }
        // What was replaced stands in the queue until its turn comes, but not beyond the number of answers.
        while self.bytes > self.most || self.queue.len() > 2 * self.kept.len() + 64 {
            let Some((turn, key)) = self.queue.pop_front() else { return };
            if self.kept.get(&key).is_some_and(|kept| kept.turn == turn)
                && self.bytes > self.most
                && let Some(old) = self.kept.remove(&key)
            {
                self.bytes -= old.bytes;
            } else if self.kept.get(&key).is_some_and(|kept| kept.turn == turn) {
                // Only the queue was too long: it stays.
                self.queue.push_back((turn, key));
            }
        }
    }
}

fn each(response: &mut Response, change: impl Fn(&mut Record)) {
    let all = response.answers.iter_mut().chain(&mut response.authorities).chain(&mut response.additionals);
    all.for_each(change);
}

/// How long an answer holds; `None` if it is not to be kept (RFC 2308).
fn lifetime(response: &Response) -> Option<u32> {
    let asked_for = match response.code {
        ResponseCode::NoError | ResponseCode::NXDomain => &response.answers,
        _ => return None,
    };
    let of_answers = asked_for.iter().map(|r| r.ttl).min();
    // An alias that leads to nothing has answers as well.
    let nothing = response.authorities.iter().find_map(|r| match &r.data {
        RData::SOA(soa) => Some(r.ttl.min(soa.minimum).min(LONGEST_NOTHING)),
        _ => None,
    });
    let ttl = match (of_answers, response.code == ResponseCode::NXDomain) {
        (Some(ttl), false) => ttl.min(LONGEST).min(nothing.unwrap_or(u32::MAX)),
        (Some(ttl), true) => ttl.min(nothing?),
        (None, _) => nothing?,
    };
    (ttl > 0).then_some(ttl)
}

/// What of a message is passed on: without EDNS, which is between two.
pub fn response(message: Message) -> Response {
    Response {
        code: message.metadata.response_code,
        authoritative: false,
        authentic: message.metadata.authentic_data,
        answers: message.answers,
        authorities: message.authorities,
        additionals: message.additionals,
    }
}

#[cfg(test)]
mod tests {
    use std::str::FromStr;

    use hickory_proto::rr::{
        Name,
        rdata::{A, SOA},
    };

    use super::*;

    fn key(name: &str) -> Key {
        Key { name: Name::from_str(name).unwrap(), asked: RecordType::A, dnssec: false, unchecked: false }
    }

    fn address(ttl: u32) -> Record {
        Record::from_rdata(Name::root(), ttl, RData::A(A::new(192, 0, 2, 1)))
    }

    fn authority(ttl: u32, minimum: u32) -> Record {
        Record::from_rdata(Name::root(), ttl, RData::SOA(SOA::new(Name::root(), Name::root(), 1, 1, 1, 1, minimum)))
    }

    fn said(code: ResponseCode, answers: &[Record], authorities: &[Record]) -> Response {
        Response { answers: answers.into(), authorities: authorities.into(), ..Response::code(code) }
    }

    #[test]
    fn how_long_an_answer_holds() {
        use ResponseCode::{NXDomain, NoError, ServFail};
        let check = |code, answers: &[Record], authorities: &[Record], expect: Option<u32>| {
            assert_eq!(lifetime(&said(code, answers, authorities)), expect, "{code} {answers:?} {authorities:?}");
        };
        check(NoError, &[address(60), address(20)], &[], Some(20));
        check(NoError, &[address(86400)], &[], Some(LONGEST));
        check(NoError, &[address(0)], &[], None);
        check(NoError, &[], &[authority(60, 10)], Some(10));
        check(NoError, &[], &[authority(7, 10)], Some(7));
        check(NXDomain, &[], &[authority(3600, 3600)], Some(LONGEST_NOTHING));
        check(NXDomain, &[], &[], None);
        check(NoError, &[], &[], None);
        check(NXDomain, &[address(5)], &[authority(60, 60)], Some(5));
        check(ServFail, &[address(60)], &[authority(60, 60)], None);
    }

    #[test]
    fn time_goes_by() {
        let mut cache = Cache::new(1 << 20);
        let start = Instant::now();
        cache.put(key("a."), &Arc::new(said(ResponseCode::NoError, &[address(60), address(20)], &[])), 100, start);
        let at = |seconds| {
            let (response, age) = cache.get(&key("a."), start + Duration::from_secs(seconds))?;
            Some((response.answers.iter().map(|r| r.ttl).collect::<Vec<_>>(), age))
        };
        assert_eq!(at(0), Some((vec![20, 20], Age::Fresh)));
        assert_eq!(at(15), Some((vec![5, 5], Age::Fresh)));
        assert_eq!(at(20), Some((vec![STALE_TTL; 2], Age::Stale)));
        assert_eq!(at(3600), Some((vec![STALE_TTL; 2], Age::Stale)));
        assert_eq!(at(3622), None);
        assert!(cache.get(&Key { dnssec: true, ..key("a.") }, start).is_none());
    }

    #[test]
    fn there_is_a_limit() {
        let mut cache = Cache::new(10 * (EACH + 100));
        let now = Instant::now();
        let response = Arc::new(said(ResponseCode::NoError, &[address(60)], &[]));
        for round in 0..100 {
            for i in 0..15 {
                cache.put(key(&format!("n{i}.")), &response, 100, now);
                assert!(cache.bytes <= cache.most && cache.queue.len() <= 100, "{round}: {}", cache.queue.len());
                assert!(cache.get(&key(&format!("n{i}.")), now).is_some(), "the newest is there");
            }
        }
        assert_eq!(cache.len(), 10);
        assert_eq!(cache.bytes, 10 * (EACH + 100));
        // The same again and again takes no more room.
        for _ in 0..1000 {
            cache.put(key("n1."), &response, 100, now);
        }
        assert!(cache.queue.len() <= 2 * cache.len() + 64);
        cache.clear();
        assert!(cache.is_empty() && cache.bytes == 0);
    }
}
