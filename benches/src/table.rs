//! A Markdown table whose columns line up in a terminal too.

/// Rows of text under titles; the first two columns are names, the others numbers.
#[derive(Debug)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(titles: impl IntoIterator<Item: Into<String>>) -> Self {
        Self { rows: vec![titles.into_iter().map(Into::into).collect()] }
    }

    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        // A bar inside a cell would end it.
        self.rows.push(cells.into_iter().map(|cell| cell.replace('|', "\\|")).collect());
    }

    /// The table, a newline at its end.
    pub(crate) fn render(&self) -> String {
        const NAMES: usize = 2;
        let n_columns = self.rows.first().map_or(0, Vec::len);
        let cell = |row: &[String], column: usize| row.get(column).cloned().unwrap_or_default();
        let widths: Vec<usize> = (0..n_columns)
            .map(|column| self.rows.iter().map(|row| cell(row, column).chars().count()).max().unwrap_or(0))
            .collect();
        let mut text = String::new();
        for (at, row) in self.rows.iter().enumerate() {
            text.push('|');
            for (column, &width) in widths.iter().enumerate() {
                let cell = cell(row, column);
                let padded = if column < NAMES { format!(" {cell:<width$} |") } else { format!(" {cell:>width$} |") };
                text.push_str(&padded);
            }
            text.push('\n');
            if at == 0 {
                text.push('|');
                for (column, &width) in widths.iter().enumerate() {
                    text.push_str(&"-".repeat(width + 1));
                    text.push_str(if column < NAMES { "-|" } else { ":|" });
                }
                text.push('\n');
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_short_rows_are_filled() {
        let mut table = Table::new(["a", "b", "n"]);
        table.row(["x|y".to_owned(), "ü".to_owned(), "10.5".to_owned()]);
        table.row(["z".to_owned()]);
        let expected = "\
| a    | b |    n |
|------|---|-----:|
| x\\|y | ü | 10.5 |
| z    |   |      |
";
        assert_eq!(table.render(), expected);
    }
}
