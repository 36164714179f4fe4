//! A tree as a picture: one row a node, lines to the parents, each row to be clicked.
//!
//! A first child stays in its parent's lane; further children branch off into lanes of their own, to the right of all that the
//! children before them take.

use std::collections::HashMap;

use eframe::egui::{
    Align2, Color32, Pos2, Rect, Response, Role, ScrollArea, Sense, Shape, Stroke, TextStyle, Ui, Vec2, WidgetInfo,
    WidgetText, epaint::CubicBezierShape,
};

use crate::theme::palette;

/// A node, parents before their children.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// Its number.
    pub id: u64,
    /// The node that it follows.
    pub parent: Option<u64>,
    /// What it is.
    pub label: String,
    /// Tokens that it stands for.
    pub tokens: u64,
    /// Bytes of its texts.
    pub bytes: u64,
    /// The nearest snapshot of the model's state, where one is known.
    pub held: Option<Held>,
}

/// What it takes to go back to a node.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Held {
    /// Tokens that would be read again.
    pub again: u64,
    /// Memory of the snapshot.
    pub bytes: u64,
}

impl Node {
    /// Counts in one line.
    fn figures(&self) -> String {
        match self.held {
            None => format!("{} tokens, {}", self.tokens, size(self.bytes)),
            Some(Held { again: 0, bytes }) => format!("{} tokens, held in {}", self.tokens, size(bytes)),
            Some(Held { again, .. }) => format!("{} tokens, {again} to read again", self.tokens),
        }
    }
}

/// Where a node is drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Place {
    /// Index of the node.
    node: usize,
    /// Index of the parent's place; none for a root.
    parent: Option<usize>,
    lane: usize,
}

const ROW: f32 = 38.0;
const LANE: f32 = 14.0;
/// Further lanes fall into the last one.
const LANES: usize = 8;
const DOT: f32 = 4.5;

/// One place a node, top to bottom. A parent that does not come before its child counts as none.
fn places(nodes: &[Node]) -> Vec<Place> {
    let mut index: HashMap<u64, usize> = HashMap::new();
    let mut children: Vec<Vec<usize>> = vec![Vec::new(); nodes.len()];
    let mut roots = Vec::new();
    for (at, node) in nodes.iter().enumerate() {
        match node.parent.and_then(|parent| index.get(&parent)) {
            Some(&parent) => children[parent].push(at),
            None => roots.push(at),
        }
        index.insert(node.id, at);
    }
    // Lanes that each node and all below it take; children come after their parents.
    let mut width = vec![1; nodes.len()];
    for at in (0..nodes.len()).rev() {
        width[at] = children[at].iter().map(|&child| width[child]).sum::<usize>().max(1);
    }
    let mut places = Vec::with_capacity(nodes.len());
    let mut open: Vec<(usize, Option<usize>, usize)> = roots.iter().rev().map(|&root| (root, None, 0)).collect();
    while let Some((node, parent, lane)) = open.pop() {
        let here = places.len();
        places.push(Place { node, parent, lane });
        let mut next = lane + width[node];
        for &child in children[node].iter().rev() {
            next -= width[child];
            open.push((child, Some(here), next));
        }
    }
    places
}

/// Shows the tree; gives the node that was clicked. `current` is where the conversation stands.
pub fn show(ui: &mut Ui, nodes: &[Node], current: Option<u64>, enabled: bool) -> Option<u64> {
    let places = places(nodes);
    // The way from the root to the current node.
    let mut on_path = vec![false; places.len()];
    let mut at = places.iter().position(|place| Some(nodes[place.node].id) == current);
    while let Some(here) = at {
        on_path[here] = true;
        at = places[here].parent;
    }
    let used = places.iter().map(|place| place.lane).max().unwrap_or(0).min(LANES - 1);
    let mut clicked = None;
    // Rows touch: the lines go on from one to the next.
    ui.spacing_mut().item_spacing.y = 0.0;
    ScrollArea::vertical().auto_shrink([false, true]).show_rows(ui, ROW, places.len(), |ui, rows| {
        let left = ui.max_rect().left() + 8.0;
        let top = ui.cursor().top();
        let dot = |at: usize| {
            let lane = places[at].lane.min(LANES - 1);
            Pos2::new(left + lane as f32 * LANE, top + (at as f32 - rows.start as f32 + 0.5) * ROW)
        };
        let colors = palette(ui.visuals());
        let line = |on: bool| Stroke::new(if on { 2.0 } else { 1.5 }, if on { colors.accent } else { colors.line });
        // Lines that cross the rows in sight, those of the current way on top.
        for wanted in [false, true] {
            for (at, place) in places.iter().enumerate() {
                let Some(parent) = place.parent.filter(|&parent| parent < rows.end && at + 1 > rows.start) else {
                    continue;
                };
                if (on_path[at] && on_path[parent]) == wanted {
                    ui.painter().extend(edge(dot(parent), dot(at), line(wanted)));
                }
            }
        }
        let text_left = left + used as f32 * LANE + 14.0;
        for at in rows.clone() {
            let node = &nodes[places[at].node];
            let is_current = Some(node.id) == current;
            let response = row(ui, node, is_current, enabled, text_left, dot(at), on_path[at]);
            if response.clicked() {
                clicked = Some(node.id);
            }
        }
    });
    clicked
}

fn row(ui: &mut Ui, node: &Node, is_current: bool, enabled: bool, left: f32, dot: Pos2, on_path: bool) -> Response {
    let sense = if enabled { Sense::click() } else { Sense::hover() };
    let (rect, response) = ui.allocate_exact_size(Vec2::new(ui.available_width(), ROW), sense);
    response
        .widget_info(|| WidgetInfo::selected(Role::TreeItem, enabled, is_current, format!("Go to: {}", node.label)));
    let colors = palette(ui.visuals());
    let text = Rect::from_min_max(Pos2::new(left, rect.top()), rect.max - Vec2::new(6.0, 0.0));
    if is_current || response.hovered() || response.has_focus() {
        let fill = if is_current { colors.question } else { colors.tool };
        let back = Rect::from_min_max(Pos2::new(left - 6.0, rect.top() + 1.0), rect.max - Vec2::new(0.0, 1.0));
        ui.painter().rect_filled(back, 6.0, fill);
        if response.has_focus() {
            ui.painter().rect_stroke(back, 6.0, Stroke::new(1.0, colors.accent), eframe::egui::StrokeKind::Inside);
        }
    }
    let color = if on_path { colors.accent } else { colors.dim };
    let fill = if on_path { color } else { colors.side };
    ui.painter().circle(dot, if is_current { DOT + 1.5 } else { DOT }, fill, Stroke::new(1.5, color));
    let line = |ui: &Ui, text: &str, style: TextStyle, color: Color32, at: Pos2| {
        let galley = WidgetText::from(text).into_galley(
            ui,
            Some(eframe::egui::TextWrapMode::Truncate),
            rect.right() - 6.0 - left,
            style,
        );
        let at = Align2::LEFT_CENTER.anchor_size(at, galley.size());
        ui.painter().galley(at.min, galley, color);
    };
    let label = if on_path { colors.text } else { colors.dim };
    line(ui, one_line(&node.label).as_str(), TextStyle::Button, label, text.left_center() - Vec2::new(0.0, 8.0));
    line(ui, &node.figures(), TextStyle::Small, colors.dim, text.left_center() + Vec2::new(0.0, 9.0));
    response.on_hover_text(format!("{}\n{}", beginning(&node.label, 400), node.figures()))
}

/// From a parent down to its child: along the child's lane, with a bend where it leaves the parent's.
fn edge(from: Pos2, to: Pos2, stroke: Stroke) -> Vec<Shape> {
    if from.x == to.x {
        return vec![Shape::line_segment([from, to], stroke)];
    }
    let bend = Pos2::new(to.x, from.y + ROW * 0.75);
    let points = [from, Pos2::new(from.x, bend.y), Pos2::new(to.x, from.y), bend];
    vec![
        CubicBezierShape::from_points_stroke(points, false, Color32::TRANSPARENT, stroke).into(),
        Shape::line_segment([bend, to], stroke),
    ]
}

fn one_line(text: &str) -> String {
    beginning(text, 120).split_whitespace().collect::<Vec<_>>().join(" ")
}

fn beginning(text: &str, chars: usize) -> String {
    let mut start: String = text.chars().take(chars).collect();
    if start.len() < text.len() {
        start.push('…');
    }
    start
}

/// Bytes for people.
pub fn size(bytes: u64) -> String {
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..1_048_576 => format!("{:.1} KiB", bytes as f64 / 1024.0),
        1_048_576..1_073_741_824 => format!("{:.1} MiB", bytes as f64 / 1_048_576.0),
        _ => format!("{:.2} GiB", bytes as f64 / 1_073_741_824.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(id: u64, parent: Option<u64>) -> Node {
        Node { id, parent, label: format!("n{id}"), tokens: 7, bytes: 2048, held: None }
    }

    fn drawn(nodes: &[Node]) -> Vec<(u64, usize)> {
        places(nodes).iter().map(|place| (nodes[place.node].id, place.lane)).collect()
    }

    #[test]
    fn branches_get_lanes_of_their_own() {
        let chain = [node(1, None), node(2, Some(1)), node(3, Some(2))];
        assert_eq!(drawn(&chain), [(1, 0), (2, 0), (3, 0)]);
        // 1 has the children 2, 4, 6; 2 has the children 3 and 5.
        let nodes =
            [node(1, None), node(2, Some(1)), node(3, Some(2)), node(4, Some(1)), node(5, Some(2)), node(6, Some(1))];
        assert_eq!(drawn(&nodes), [(1, 0), (2, 0), (3, 0), (5, 1), (4, 2), (6, 3)]);
        let roots = [node(1, None), node(2, None), node(3, Some(1))];
        assert_eq!(drawn(&roots), [(1, 0), (3, 0), (2, 0)]);
        assert_eq!(places(&roots)[2].parent, None);
    }

    #[test]
    fn what_it_takes_to_go_back_is_said() {
        let figures = |held| Node { held, ..node(1, None) }.figures();
        assert_eq!(figures(None), "7 tokens, 2.0 KiB");
        assert_eq!(figures(Some(Held { again: 0, bytes: 1 << 20 })), "7 tokens, held in 1.0 MiB");
        assert_eq!(figures(Some(Held { again: 3, bytes: 1 << 20 })), "7 tokens, 3 to read again");
    }

    #[test]
    fn what_is_no_tree_is_drawn_all_the_same() {
        assert_eq!(drawn(&[]), []);
        assert_eq!(drawn(&[node(1, Some(1)), node(2, Some(9)), node(3, Some(4)), node(4, Some(3))]).len(), 4);
        let long: Vec<Node> = (0..100_000).map(|id| node(id, id.checked_sub(1))).collect();
        assert_eq!(drawn(&long).len(), 100_000, "no recursion");
    }

    #[test]
    fn sizes_are_for_people() {
        let sizes = [0, 1023, 1024, 3 << 20, 5 << 30].map(size);
        assert_eq!(sizes, ["0 B", "1023 B", "1.0 KiB", "3.0 MiB", "5.00 GiB"]);
        assert_eq!((one_line("a\n  b"), beginning("日本語", 2)), ("a b".into(), "日本…".into()));
    }
}
