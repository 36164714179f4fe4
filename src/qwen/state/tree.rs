//! A prefix tree over tokens: values by the tokens that lead to them.
//!
//! Tokens that several values have in common are held once. A node exists where values hang or ways part, so that looking up
//! takes the length of what is looked up, however many values there are.

/// Values, any number at each sequence of tokens.
#[derive(Debug)]
pub(crate) struct Tree<T> {
    root: Node<T>,
}

#[derive(Debug)]
struct Node<T> {
    /// Tokens from the parent to here; empty for the root alone.
    edge: Vec<u32>,
    /// Each begins with another token.
    children: Vec<Node<T>>,
    values: Vec<T>,
}

/// A value and where it hangs.
#[derive(Debug)]
pub(crate) struct Found<'a, T> {
    /// Its tokens.
    pub depth: u64,
    /// Tokens of the nearest value above it, 0 where there is none.
    pub above: u64,
    pub value: &'a T,
}

impl<T> Default for Tree<T> {
    fn default() -> Self {
        Tree { root: Node { edge: Vec::new(), children: Vec::new(), values: Vec::new() } }
    }
}

fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

impl<T> Node<T> {
    fn child(&self, token: u32) -> Option<usize> {
        self.children.iter().position(|c| c.edge.first() == Some(&token))
    }

    /// Takes a node out that holds nothing, or one way on.
    fn tidy(&mut self, at: usize) {
        let node = &mut self.children[at];
        if !node.values.is_empty() || node.children.len() > 1 {
            return;
        }
        match node.children.pop() {
            None => {
                self.children.swap_remove(at);
            }
            Some(mut only) => {
                let mut edge = std::mem::take(&mut node.edge);
                edge.append(&mut only.edge);
                only.edge = edge;
                self.children[at] = only;
            }
        }
    }
}

impl<T> Tree<T> {
    /// Hangs a value at the end of `ids`.
    pub fn insert(&mut self, ids: &[u32], value: T) {
        let mut node = &mut self.root;
        let mut rest = ids;
        while let Some(&token) = rest.first() {
            let Some(at) = node.child(token) else {
                node.children.push(Node { edge: rest.to_vec(), children: Vec::new(), values: vec![value] });
                return;
            };
            node = &mut node.children[at];
            let same = common(&node.edge, rest);
            if same < node.edge.len() {
                // The ways part inside the edge: what was here moves down.
                let lower = Node {
                    edge: node.edge.split_off(same),
                    children: std::mem::take(&mut node.children),
                    values: std::mem::take(&mut node.values),
                };
                node.children.push(lower);
            }
            rest = &rest[same..];
        }
        node.values.push(value);
    }

    /// The values on the way along `ids`, shortest first.
    pub fn along<'a>(&'a self, ids: &[u32]) -> Vec<Found<'a, T>> {
        let mut out: Vec<Found<'a, T>> = Vec::new();
        let (mut node, mut rest, mut depth, mut above) = (&self.root, ids, 0, 0);
        loop {
            out.extend(node.values.iter().map(|value| Found { depth, above, value }));
            if !node.values.is_empty() {
                above = depth;
            }
            let next = rest.first().and_then(|token| node.child(*token)).map(|at| &node.children[at]);
            match next {
                Some(next) if rest.starts_with(&next.edge) => {
                    node = next;
                    rest = &rest[next.edge.len()..];
                    depth += next.edge.len() as u64;
                }
                _ => return out,
            }
        }
    }

    /// All values, each after those above it.
    pub fn all(&self) -> Vec<Found<'_, T>> {
        let mut out = Vec::new();
        let mut open = vec![(&self.root, 0, 0)];
        while let Some((node, depth, above)) = open.pop() {
            out.extend(node.values.iter().map(|value| Found { depth, above, value }));
            let above = if node.values.is_empty() { above } else { depth };
            open.extend(node.children.iter().map(|c| (c, depth + c.edge.len() as u64, above)));
        }
        out
    }

    /// Takes the values at the end of `ids` that `gone` says yes to.
    pub fn remove(&mut self, ids: &[u32], gone: impl Fn(&T) -> bool) -> Vec<T> {
        // The way down as places among children; the way back up tidies.
        let mut way = Vec::new();
        let mut node = &mut self.root;
        let mut rest = ids;
        while let Some(&token) = rest.first() {
            let Some(at) = node.child(token).filter(|at| rest.starts_with(&node.children[*at].edge)) else {
                return Vec::new();
            };
            way.push(at);
            node = &mut node.children[at];
            rest = &rest[node.edge.len()..];
        }
        let (out, kept) = std::mem::take(&mut node.values).into_iter().partition(|v| gone(v));
        node.values = kept;
        // Only the node itself and its parent can have become superfluous.
        for last in (way.len().saturating_sub(2)..way.len()).rev() {
            let parent = way[..last].iter().fold(&mut self.root, |node, at| &mut node.children[*at]);
            parent.tidy(way[last]);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn depths(found: Vec<Found<'_, usize>>) -> Vec<(u64, u64, usize)> {
        let mut out: Vec<_> = found.into_iter().map(|f| (f.depth, f.above, *f.value)).collect();
        out.sort_unstable();
        out
    }

    fn nodes(node: &Node<usize>) -> usize {
        1 + node.children.iter().map(nodes).sum::<usize>()
    }

    proptest! {
        #[test]
        fn it_finds_what_a_list_finds(
            keys in prop::collection::vec(prop::collection::vec(0u32..3, 0..7), 1..24),
            gone in prop::collection::vec(any::<bool>(), 24),
            asked in prop::collection::vec(0u32..3, 0..9),
        ) {
            let mut tree = Tree::default();
            for (i, key) in keys.iter().enumerate() {
                tree.insert(key, i);
            }
            for (i, key) in keys.iter().enumerate().filter(|(i, _)| gone[*i]) {
                prop_assert_eq!(tree.remove(key, |v| *v == i), vec![i]);
                prop_assert!(tree.remove(key, |v| *v == i).is_empty());
            }
            let kept = || keys.iter().enumerate().filter(|(i, _)| !gone[*i]);
            let above = |key: &[u32]| {
                let up = kept().filter(|(_, k)| k.len() < key.len() && key.starts_with(k)).map(|(_, k)| k.len());
                up.max().unwrap_or(0) as u64
            };
            let row = |(i, key): (usize, &Vec<u32>)| (key.len() as u64, above(key), i);
            let mut expected: Vec<_> = kept().map(row).collect();
            expected.sort_unstable();
            prop_assert_eq!(depths(tree.all()), expected);
            let mut expected: Vec<_> = kept().filter(|(_, key)| asked.starts_with(key)).map(row).collect();
            expected.sort_unstable();
            prop_assert_eq!(depths(tree.along(&asked)), expected);
            // Nodes where values hang, and at most one fork less.
            prop_assert!(nodes(&tree.root) <= 2 * kept().count() + 1);
        }
    }
}
