//! `resource.k8s.io`: devices, who offers them and who asks for them
//! (<https://kubernetes.io/docs/concepts/scheduling-eviction/dynamic-resource-allocation/>).
//!
//! Upstream says what is wrong here partly by hand and partly by rules that stand beside its types; those have words of
//! their own, and where both know an error theirs are heard (KEP-5073). Functions named `declared` speak so.

mod capacity;
mod claim;
mod class;
mod device;
mod parts;
mod request;
mod selector;
mod slice;
mod status;
mod taint;

use crate::row::Row;

pub(super) fn rows() -> [Row; 5] {
    [claim::claim(), claim::template(), slice::row(), class::row(), taint::row()]
}
